; fork-cow: after a fork of the VMM the guest's stores are its own; the child keeps the old bytes
;
; The VMM forks, so every page of the guest is shared copy-on-write. The guest writes (stores, locked
; increments, string stores), reads and runs code in such pages; the child must still see the bytes of
; the moment of the fork. Then the child exits and the guest writes the pages it alone has again.
;
; param pages=16    pages of data
; param rounds=2    forks, one after the other
; vmcalls: fork child_read child_exit
.include "runtime.inc"

main:
    PARAM r12, "pages", 16
    PARAM r14, "rounds", 2
    AT_LEAST r12, 1
    mov rdi, r12
    call pages_alloc
    mov r13, rax
    mov ebx, 1
.round:
    mov [round], rbx
    call one_fork
    inc rbx
    cmp rbx, r14
    jbe .round
    ret

one_fork:
    call write_old
    HOST0 VMCALL_FORK
    HOST_CHECK "fork", 0
    mov [forked], rax
    call write_new
    call check_own
    CHECK_EQ "the guest reads what it wrote after the fork", rax, 0
    cmp qword ptr [forked], 0
    je .alone
    call check_child
    CHECK_EQ "the child keeps the bytes of the fork", rax, 0
    HOST0 VMCALL_CHILD_EXIT
    HOST_CHECK "the child exits", 0
    HOST2 VMCALL_CHILD_READ, r13, 4
    CHECK_EQ "no child is left to read", rax, -ECHILD
.alone:
    call write_old                       ; the last owner writes in place
    call check_old
    CHECK_EQ "the guest writes after the child's exit", rax, 0
    ret

; r8d = the value page number rcx has before the fork. Changes rax.
old_value:
    mov r8, [round]
    shl r8, 20
    lea r8, [r8 + rcx*4 + 0x1000]
    ret

write_old:
    xor ecx, ecx
.page:
    call old_value
    mov rdi, rcx
    shl rdi, 12
    add rdi, r13
    mov [rdi + 64], r8d
    mov [rdi + 4092], r8d
    inc rcx
    cmp rcx, r12
    jb .page
    ret

; Page i of four kinds, by i % 4: left alone, a store, a locked increment, a string store.
write_new:
    push rbx
    xor ebx, ebx
.page:
    mov rdi, rbx
    shl rdi, 12
    add rdi, r13
    mov eax, ebx
    and eax, 3
    jz .next
    dec eax
    jz .store
    dec eax
    jz .increment
    mov eax, 0xABCD
    mov ecx, 4096 / 4
    rep stosd
    jmp .next
.store:
    mov dword ptr [rdi + 64], 0xABCD
    mov dword ptr [rdi + 4092], 0xABCD
    jmp .next
.increment:
    lock inc dword ptr [rdi + 64]
    lock inc dword ptr [rdi + 4092]
.next:
    inc rbx
    cmp rbx, r12
    jb .page
    pop rbx
    ret

; rax = words of the guest's own pages that are wrong after write_new.
check_own:
    xor edx, edx
    xor ecx, ecx
.page:
    call old_value
    mov eax, ecx
    and eax, 3
    jz .compare
    cmp eax, 2
    je .increment
    mov r8d, 0xABCD
    jmp .compare
.increment:
    inc r8d
.compare:
    call compare_page
    inc rcx
    cmp rcx, r12
    jb .page
    mov eax, edx
    ret

; rax = words that are not the old ones.
check_old:
    xor edx, edx
    xor ecx, ecx
.page:
    call old_value
    call compare_page
    inc rcx
    cmp rcx, r12
    jb .page
    mov eax, edx
    ret

; Adds to edx how many of the two words of page rcx are not r8d.          changes rax, rdi
compare_page:
    mov rdi, rcx
    shl rdi, 12
    add rdi, r13
    xor eax, eax
    cmp [rdi + 64], r8d
    setne al
    add edx, eax
    cmp [rdi + 4092], r8d
    setne al
    add edx, eax
    ret

; rax = words of the child that are not the old ones.
check_child:
    xor edx, edx
    xor ecx, ecx
.page:
    call old_value
    mov rdi, rcx
    shl rdi, 12
    add rdi, r13
    add rdi, 64
    HOST2 VMCALL_CHILD_READ, rdi, 4
    cmp rax, r8
    setne al
    movzx eax, al
    add edx, eax
    add rdi, 4092 - 64
    HOST2 VMCALL_CHILD_READ, rdi, 4
    cmp rax, r8
    setne al
    movzx eax, al
    add edx, eax
    inc rcx
    cmp rcx, r12
    jb .page
    mov eax, edx
    ret

.section bss
.align 8
round:  .skip 8
forked: .skip 8
