; selfmod: code that is changed runs as changed: in place, through an alias, after its page moved
;
; A function on a page of its own is rewritten and called again: through its own address, through a
; second address of the same frame that may not be executed, just ahead of the instruction pointer,
; across a page border, by the host, and after the host migrated it or swapped it out.
;
; param rounds=50   rewrites through the alias
; vmcalls: migrate swap_out host_write
.include "runtime.inc"

.equ ALIAS_VA, TEST_VA
.equ MOV_EAX, 0xB8
.equ RET, 0xC3

main:
    PARAM r14, "rounds", 50
    AT_LEAST r14, 1
    mov edi, 2
    call pages_alloc
    mov r13, rax                         ; two pages of code
    mov rdi, ALIAS_VA
    mov rsi, r13
    or rsi, PTE_P + PTE_W
    or rsi, [nx_bit]
    call map_page
    mov r15, ALIAS_VA
    call in_place
    call ahead
    call through_alias
    call border
    call moved
    call swapped
    call by_host
    ret

; mov eax, ecx; ret at rdi
write_function:
    mov byte ptr [rdi], MOV_EAX
    mov [rdi + 1], ecx
    mov byte ptr [rdi + 5], RET
    ret

; Rewrites and calls r14 times: at rdi, called at rsi. rbx = wrong answers.
rewrite:
    push rbp
    xor ebx, ebx
    mov rbp, r14
.again:
    mov [rdi + 1], ebp
    push rdi
    push rsi
    xor eax, eax
    cpuid                                ; serializes, as the SDM asks of code changed through an alias
    pop rsi
    pop rdi
    call rsi
    cmp eax, ebp
    je .right
    inc qword ptr [wrong]
.right:
    dec rbp
    jnz .again
    mov rbx, [wrong]
    mov qword ptr [wrong], 0
    pop rbp
    ret

in_place:
    mov rdi, r13
    mov ecx, 5
    call write_function
    call r13
    CHECK_EQ "fresh code", rax, 5
    mov rdi, r13
    mov rsi, r13
    call rewrite
    CHECK_EQ "code rewritten in place", rbx, 0
    ret

; The store changes the immediate of the instruction right behind it.
ahead:
    lea rdi, [r13 + 0x100]
    mov esi, ahead_code
    mov ecx, ahead_end - ahead_code
    rep movsb
    mov ecx, 0x600d
    lea rax, [r13 + 0x100]
    call rax
    CHECK_EQ "an instruction changed right ahead of the CPU", rax, 0x600d
    mov ecx, 0x600e
    lea rax, [r13 + 0x100]
    call rax
    CHECK_EQ "and once more", rax, 0x600e
    ret

ahead_code:
    call ahead_next
ahead_next:
    pop rdx
    mov [rdx + ahead_patched - ahead_next + 1], ecx
ahead_patched:
    mov eax, 0xbad
    ret
ahead_end:

through_alias:
    mov rdi, r13
    mov ecx, 7
    call write_function
    call r13
    mov rdi, r15
    mov rsi, r13
    call rewrite
    CHECK_EQ "code rewritten through an alias", rbx, 0
    mov byte ptr [r15 + 0x200], RET      ; a warm alias store to a page whose code was never run there
    lea rax, [r13 + 0x200]
    call rax
    mov rdi, r15
    mov rsi, r13
    call rewrite
    CHECK_EQ "and again with both mappings warm", rbx, 0
    ret

; mov eax, imm32 begins 2 bytes before the border; the second page is rewritten.
border:
    lea rdi, [r13 + PAGE_SIZE - 2]
    mov ecx, 0x01020304
    call write_function
    call rdi
    CHECK_EQ "code across a page border", rax, 0x01020304
    mov byte ptr [r13 + PAGE_SIZE + 2], 0x09
    call rdi
    CHECK_EQ "its second page rewritten", rax, 0x09020304
    mov byte ptr [r13 + PAGE_SIZE - 1], 0x08
    call rdi
    CHECK_EQ "its first page rewritten", rax, 0x09020308
    ret

moved:
    HOST2 VMCALL_MIGRATE, r13, 2
    HOST_CHECK "migrate the code", 2
    mov rdi, r13
    mov rsi, r13
    call rewrite
    CHECK_EQ "code rewritten after migration", rbx, 0
    HOST2 VMCALL_MIGRATE, r13, 2
    mov rdi, r15
    mov rsi, r13
    call rewrite
    CHECK_EQ "and through the alias", rbx, 0
    ret

swapped:
    mov rdi, r13
    mov ecx, 11
    call write_function
    HOST2 VMCALL_SWAP_OUT, r13, 2
    HOST_CHECK "swap the code out", 2
    call r13
    CHECK_EQ "code comes back from swap", rax, 11
    HOST2 VMCALL_SWAP_OUT, r13, 2
    mov rdi, r15
    mov rsi, r13
    call rewrite
    CHECK_EQ "code rewritten after swap", rbx, 0
    ret

by_host:
    NEED_HOST "code written by the host", .end
    mov rdi, r13
    mov ecx, 13
    call write_function
    call r13
    lea rcx, [r13 + 4]                   ; the immediate's high byte and the ret
    HOST3 VMCALL_HOST_WRITE, rcx, 0x9000 + RET, 2
    cmp rax, -ENOSYS
    je .end
    HOST3 VMCALL_HOST_WRITE, rcx, 0xC355, 2
    CHECK_EQ "the host writes code", rax, 0
    call r13
    CHECK_EQ "and it runs", rax, 0x5500000d
.end:
    ret

.section bss
.align 8
wrong:  .skip 8
