; smm: system-management mode has memory of its own at addresses of the guest's, and loses nothing of either
;
; An SMI interrupts the guest anywhere; KVM saves its state in SMRAM, which is seen in SMM only, and runs the
; handler by memory slots of a second address space. RSM goes back. The host takes pages of both meanwhile.
;
; param rounds=8    SMIs, each with pages taken away before
; param storm=16    SMIs more to every other CPU, if there are any
; vmcalls: smram smi smram_out swap_out migrate cpu_count start_cpu
.include "runtime.inc"
.include "cpus.inc"

.equ HIDDEN, SMRAM_GPA + 0x1000          ; one page in SMRAM, another in the guest's memory
.equ PATIENCE, 1 << 28
.equ HANDLER_SIZE, handler_end - handler

main:
    PARAM r12, "rounds", 8
    PASS "the guest runs without SMM"
    NEED_HOST "SMM", .end
    call rsm_is_invalid
    HOST1 VMCALL_SMI, 0
    CHECK_EQ "an SMI before there is SMRAM", rax, -ENOTTY
    call page_alloc
    mov [shared], rax
    mov r13, rax
    mov edi, handler
    mov [rdi + counter_at - handler], eax
    mov [rdi + counter_at2 - handler], eax
    add eax, 8
    mov [rdi + copy_at - handler], eax
    HOST2 VMCALL_SMRAM, rdi, HANDLER_SIZE
    CHECK_EQ "SMRAM with a handler", rax, 0
    HOST2 VMCALL_SMRAM, rdi, HANDLER_SIZE
    CHECK_EQ "there is one only", rax, -EEXIST
    mov eax, HIDDEN
    mov rcx, [rax]
    mov [before], rcx
    call registers
    call rounds
    mov eax, HIDDEN
    mov rcx, [rax]
    CHECK_EQ "the guest's own page at that address is as it was", rcx, qword ptr [before]
    call others
.end:
    ret

; 16-bit code: one more in the shared page and in SMRAM, whose count goes to the shared page's second word.
.section data
handler:
    .byte 0x66, 0x67, 0xFF, 0x05         ; inc dword ptr [counter]
counter_at:
    .long 0
    .byte 0x66, 0x67, 0xFF, 0x05         ; inc dword ptr [HIDDEN]
    .long HIDDEN
    .byte 0x67, 0x66, 0xA1               ; mov eax, [HIDDEN]
    .long HIDDEN
    .byte 0x67, 0x66, 0xA3               ; mov [copy], eax
copy_at:
    .long 0
    .byte 0x67, 0x66, 0x8B, 0x1D         ; mov ebx, [counter]
counter_at2:
    .long 0
    .byte 0x0F, 0xAA                     ; rsm
handler_end:
.section text

rsm_is_invalid:
    TRY .after
    .byte 0x0F, 0xAA
.after:
    ENDTRY
    CHECK_EQ "RSM outside SMM is an invalid opcode", qword ptr [caught_vector], 6
    ret

; Every register is what it was, whatever the handler does to its own.
registers:
    push r12
    push r13
    mov rbx, 0x0123456789ABCDEF
    mov rcx, 0x1111111122222222
    mov rdx, 0x3333333344444444
    mov rsi, 0x5555555566666666
    mov rdi, 0x7777777788888888
    mov r8, 0x99999999AAAAAAAA
    mov r12, 0xBBBBBBBBCCCCCCCC
    mov r15, 0xDDDDDDDDEEEEEEEE
    mov [saved_rsp], rsp
    HOST1 VMCALL_SMI, 0
    mov [result], rax
    xor eax, eax
    mov r9, 0x0123456789ABCDEF
    cmp rbx, r9
    setne al
    mov r9, 0x1111111122222222
    cmp rcx, r9
    setne ah
    mov r9, 0x99999999AAAAAAAA
    cmp r8, r9
    setne r10b
    or al, r10b
    mov r9, 0xBBBBBBBBCCCCCCCC
    cmp r12, r9
    setne r10b
    or al, r10b
    mov r9, 0xDDDDDDDDEEEEEEEE
    cmp r15, r9
    setne r10b
    or al, r10b
    cmp rsp, [saved_rsp]
    setne r10b
    or al, r10b
    or al, ah
    movzx eax, al
    pop r13
    pop r12
    CHECK_EQ "an SMI", qword ptr [result], 0
    CHECK_EQ "leaves the registers as they are", rax, 0
    mov eax, [r13]
    CHECK_EQ "the handler ran", rax, 1
    mov eax, [r13 + 8]
    CHECK_EQ "by memory of its own", rax, 1
    ret

; Pages of either space go before each SMI.
rounds:
    xor ebx, ebx
    mov rbp, r12
    test rbp, rbp
    jz .done
.round:
    HOST2 VMCALL_SWAP_OUT, r13, 1
    test ebp, 1
    jz .smram
    mov eax, [r13]
    HOST2 VMCALL_MIGRATE, r13, 1
    jmp .smi
.smram:
    HOST0 VMCALL_SMRAM_OUT
.smi:
    mov r14d, [r13]
    inc r14d
    HOST1 VMCALL_SMI, 0
    or rbx, rax
    mov eax, [r13]
    xor eax, r14d
    or rbx, rax
    mov eax, [r13 + 8]
    xor eax, r14d
    or rbx, rax
    dec rbp
    jnz .round
.done:
    CHECK_EQ "no SMI is lost, wherever the pages are", rbx, 0
    ret

; Other CPUs are interrupted wherever they are.
others:
    HOST0 VMCALL_CPU_COUNT
    mov r14, rax
    cmp r14, 2
    jb .end
    call start_cpus
    PARAM rbp, "storm", 16
    test rbp, rbp
    jz .enough
.round:
    mov r15, r14
.cpu:
    dec r15
    jz .next
    HOST1 VMCALL_SMI, r15
    jmp .cpu
.next:
    HOST0 VMCALL_SMRAM_OUT
    dec rbp
    jnz .round
.enough:
    mov byte ptr [enough], 1
    dec r14
    mov ecx, PATIENCE
.wait:
    cmp [done], r14
    jae .all
    pause
    dec ecx
    jnz .wait
.all:
    CHECK_EQ "every CPU finished", qword ptr [done], r14
    CHECK_EQ "and counted right", qword ptr [wrong], 0
.end:
    ret

work:
    xor eax, eax
    xor ecx, ecx
.next:
    inc rax
    inc rcx
    cmp rax, rcx
    je .same
    lock inc qword ptr [wrong]
.same:
    cmp byte ptr [enough], 0
    je .next
    lock inc qword ptr [done]
    ret

.section bss
.align 8
shared:         .skip 8
before:         .skip 8
result:         .skip 8
saved_rsp:      .skip 8
done:           .skip 8
wrong:          .skip 8
enough:         .skip 8
