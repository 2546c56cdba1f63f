; apf: the guest runs on while the host reads a page in from swap
;
; The guest asks KVM to be told when a page it touches is on disk: it gets a #PF with a token in CR2, works on
; something else, and an interrupt says when the page is there. Before that it does not ask, and its vCPU sleeps
; meanwhile. Either way every byte is what it was. A machine has this with --param kvm.async_pf=Y.
;
; param pages=8     pages that go to swap
; param rounds=2    how often
; vmcalls: swap_out reclaim
.include "runtime.inc"

.equ KVM_LEAF, 0x40000100
.equ MSR_KVM_ASYNC_PF_EN, 0x4b564d02
.equ MSR_KVM_ASYNC_PF_INT, 0x4b564d06
.equ MSR_KVM_ASYNC_PF_ACK, 0x4b564d07
.equ ENABLED, 1
.equ SEND_ALWAYS, 2
.equ DELIVERY_AS_INT, 8
.equ READY_VECTOR, 0xEC
.equ PF_VECTOR, 14
.equ AREA_FLAGS, 0
.equ AREA_TOKEN, 4
.equ PATIENCE, 1 << 22

main:
    PARAM r12, "pages", 8
    AT_LEAST r12, 1
    PARAM r15, "rounds", 2
    AT_LEAST r15, 1
    mov rdi, r12
    call pages_alloc
    mov r13, rax
    PASS "the guest runs without asynchronous page faults"
    NEED_HOST "a host that swaps", .end
    call storm
    CHECK_EQ "nobody is told who did not ask", qword ptr [waits], 0
    mov eax, KVM_LEAF
    cpuid
    cmp ebx, 0x4b4d564b                  ; KVMK
    jne .without
    mov eax, KVM_LEAF + 1
    cpuid
    and eax, 1 << 4 | 1 << 14
    CHECK_EQ "KVM offers tokens and interrupts", rax, 1 << 4 | 1 << 14
    call enable
    call storm
    call judge
    call disable
    ret
.without:
    mov ecx, MSR_KVM_ASYNC_PF_EN
    xor eax, eax
    xor edx, edx
    TRY .trapped
    wrmsr
.trapped:
    ENDTRY
    CHECK_EQ "without the feature its MSR is #GP", qword ptr [caught_vector], 13
.end:
    ret

enable:
    mov qword ptr [PF_VECTOR * 8 + trap_handlers], page_fault
    mov qword ptr [READY_VECTOR * 8 + trap_handlers], page_ready
    mov ecx, MSR_KVM_ASYNC_PF_INT
    mov eax, READY_VECTOR
    xor edx, edx
    wrmsr
    mov ecx, MSR_KVM_ASYNC_PF_EN
    mov eax, area + ENABLED + SEND_ALWAYS + DELIVERY_AS_INT
    xor edx, edx
    wrmsr
    mov ecx, MSR_KVM_ASYNC_PF_EN
    rdmsr
    CHECK_EQ "the MSR reads back", rax, area + ENABLED + SEND_ALWAYS + DELIVERY_AS_INT
    mov ecx, PATIENCE
    sti
.wait:
    cmp qword ptr [ready], 0
    jne .woken
    pause
    dec ecx
    jnz .wait
.woken:
    cli
    mov eax, [ready]
    mov ecx, 0xFFFFFFFF
    CHECK_EQ "first everybody is woken", rax, rcx
    mov qword ptr [readies], 0
    ret

disable:
    mov ecx, MSR_KVM_ASYNC_PF_EN
    xor eax, eax
    xor edx, edx
    wrmsr
    mov rbx, [waits]
    call storm
    mov rax, [waits]
    CHECK_EQ "nobody is told who asks no more", rax, rbx
    mov qword ptr [PF_VECTOR * 8 + trap_handlers], 0
    ret

; The pages are written, swapped out, and read with interrupts on.
storm:
    push rbx
    push r14
    xor ebx, ebx
    mov r14, r15
.round:
    mov rdi, r13
    mov rsi, r14
    mov rdx, r12
    shl rdx, 9
    call fill_words
    HOST2 VMCALL_SWAP_OUT, r13, r12
    mov rcx, r12
    shl rcx, 1
    HOST1 VMCALL_RECLAIM, rcx            ; what was written out is freed
    mov rdi, r13
    mov rsi, r14
    mov rdx, r12
    shl rdx, 9
    sti
    call check_words
    cli
    or rbx, rax
    dec r14
    jnz .round
    CHECK_EQ "what was swapped out comes back", rbx, 0
    pop r14
    pop rbx
    ret

judge:
    cmp qword ptr [waits], 0
    setne al
    movzx eax, al
    CHECK_EQ "the guest was told of pages on disk", rax, 1
    mov rax, [readies]
    CHECK_EQ "each of them was said to be ready", rax, qword ptr [waits]
    cmp qword ptr [work], 0
    setne al
    movzx eax, al
    CHECK_EQ "meanwhile it worked", rax, 1
    CHECK_EQ "no wait was given up", qword ptr [lost], 0
    mov eax, [area + AREA_FLAGS]
    CHECK_EQ "no token is left", rax, 0
    ret

; A #PF whose `flags` say that CR2 is a token: work until it is ready, then touch the page again.
page_fault:
    cmp dword ptr [area + AREA_FLAGS], 1
    jne default_handler
    mov dword ptr [area + AREA_FLAGS], 0
    inc qword ptr [waits]
    mov rbx, cr2
    mov ecx, PATIENCE
    sti
.work:
    inc qword ptr [work]
    cmp [ready], rbx
    je .ready
    dec ecx
    jnz .work
    inc qword ptr [lost]
.ready:
    cli
    ret

page_ready:
    mov eax, [area + AREA_TOKEN]
    mov [ready], rax
    inc qword ptr [readies]
    mov dword ptr [area + AREA_TOKEN], 0
    mov ecx, MSR_KVM_ASYNC_PF_ACK
    mov eax, 1
    xor edx, edx
    wrmsr
    ret

.section bss
.align 64
area:       .skip 64
ready:      .skip 8
readies:    .skip 8
waits:      .skip 8
work:       .skip 8
lost:       .skip 8
