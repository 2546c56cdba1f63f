; guest-memfd: memory that is a file of KVM's, and pages that become private and shared again
;
; A slot of guest_memfd that the VMM has mapped, too, is shared as any memory. Then the guest asks for pages to
; become private (KVM_HC_MAP_GPA_RANGE), so that the VMM does not see what it stores, and shared again; each
; change drops the other kind's bytes, until nothing is left of them. Only a protected machine can do that:
; --param vmm.vm_type=sw-protected.
;
; Where there is a second CPU it reads the pages all the while.
;
; param pages=16    pages of the slot, at least 4
; param rounds=4    conversions of every second page, there and back
; vmcalls: gmem_create gmem_punch map_gpa_range memory_attributes host_read host_write cpu_count start_cpu
.include "runtime.inc"

.equ ENCRYPTED, 16
.equ PRIVATE, 8
.equ READER_STACK, 1024

main:
    PARAM r12, "pages", 16
    AT_LEAST r12, 4
    mov [reader_pages], r12
    PARAM r15, "rounds", 4
    PASS "the guest runs without guest_memfd"
    NEED_HOST "guest_memfd", .end
    mov r13, [slot_gpa]
    HOST3 VMCALL_GMEM_CREATE, r13, r12, 3
    cmp rax, -EINVAL
    je .protected                        ; such a machine's memory is not shared from the beginning
    HOST_CHECK "create", 1
    test rax, rax
    jz .end
    call mapped
    HOST3 VMCALL_MAP_GPA_RANGE, r13, r12, ENCRYPTED
    CHECK_EQ "without protection nothing becomes private", rax, -EINVAL
    ret
.protected:
    HOST3 VMCALL_GMEM_CREATE, r13, r12, 0
    HOST_CHECK "create", 1
    test rax, rax
    jz .end
    call kinds
    call both_kept
    mov qword ptr [r13], 0
    HOST0 VMCALL_CPU_COUNT
    cmp rax, 1
    je .alone
    HOST4 VMCALL_START_CPU, 1, reader, reader_stack + READER_STACK, 0
    CHECK_EQ "a second CPU reads", rax, 0
.alone:
    call storm
    mov qword ptr [stop], 1
    CHECK_EQ "whoever reads sees no other bytes", qword ptr [bad], 0
.end:
    ret

; Guest and VMM have the same pages.
mapped:
    mov qword ptr [r13 + 8], 0x99
    HOST2 VMCALL_HOST_READ, r13, 4
    CHECK_EQ "a page of zeros, which the VMM sees, too", rax, 0
    lea rcx, [r13 + 8]
    HOST2 VMCALL_HOST_READ, rcx, 4
    CHECK_EQ "the VMM reads what the guest stored", rax, 0x99
    lea rcx, [r13 + 4096]
    HOST3 VMCALL_HOST_WRITE, rcx, 0x77, 4
    mov eax, [r13 + 4096]
    CHECK_EQ "the guest reads what the VMM stored", rax, 0x77
    HOST2 VMCALL_GMEM_PUNCH, r13, 1
    CHECK_EQ "a hole", rax, 0
    mov rax, [r13 + 8]
    CHECK_EQ "a hole reads as zeros", rax, 0
    mov eax, [r13 + 4096]
    CHECK_EQ "what lies beside it stays", rax, 0x77
    ret

; One page: shared, private, shared.
kinds:
    mov qword ptr [r13], 0x11
    HOST3 VMCALL_MAP_GPA_RANGE, r13, 1, ENCRYPTED
    CHECK_EQ "a page becomes private", rax, 0
    mov rax, [r13]
    CHECK_EQ "a new private page reads as zeros", rax, 0
    mov qword ptr [r13], 0x22
    HOST2 VMCALL_HOST_READ, r13, 4
    CHECK_EQ "the VMM does not see it", rax, 0
    HOST3 VMCALL_HOST_WRITE, r13, 0x33, 4
    mov rax, [r13]
    CHECK_EQ "nor does it reach it", rax, 0x22
    HOST3 VMCALL_MAP_GPA_RANGE, r13, 1, 0
    mov rax, [r13]
    CHECK_EQ "shared again, it has what the VMM stored meanwhile", rax, 0x33
    HOST3 VMCALL_MAP_GPA_RANGE, r13, 1, ENCRYPTED
    mov rax, [r13]
    CHECK_EQ "its private bytes were dropped", rax, 0
    HOST3 VMCALL_MAP_GPA_RANGE, r13, 1, 0
    lea rcx, [r13 + 8]
    HOST3 VMCALL_MAP_GPA_RANGE, rcx, 1, 0
    CHECK_EQ "half a page cannot be converted", rax, -EINVAL
    HOST3 VMCALL_MAP_GPA_RANGE, r13, 1, 1
    CHECK_EQ "nor to another size", rax, -EINVAL
    ret

; The VMM's own change of the attribute drops nothing.
both_kept:
    mov qword ptr [r13], 0x44
    HOST3 VMCALL_MEMORY_ATTRIBUTES, r13, 1, PRIVATE
    mov qword ptr [r13], 0x55
    HOST3 VMCALL_MEMORY_ATTRIBUTES, r13, 1, 0
    mov rax, [r13]
    CHECK_EQ "the shared bytes are kept", rax, 0x44
    HOST3 VMCALL_MEMORY_ATTRIBUTES, r13, 1, PRIVATE
    mov rax, [r13]
    CHECK_EQ "the private bytes, too", rax, 0x55
    HOST3 VMCALL_MAP_GPA_RANGE, r13, r12, 0
    ret

; Every second page goes there and back while its neighbours keep their bytes.
storm:
    xor ebx, ebx
    mov r14, r15
.round:
    mov rbp, r12
    and rbp, -2
    mov rsi, r13
.pair:
    mov [rsi + 4096], rsi                ; the neighbour, which stays shared
    HOST3 VMCALL_MAP_GPA_RANGE, rsi, 1, ENCRYPTED
    or rbx, rax
    or rbx, [rsi]                        ; zeros
    mov [rsi], rsi
    mov rax, [rsi]
    xor rax, rsi
    or rbx, rax
    mov rax, [rsi + 4096]
    xor rax, rsi
    or rbx, rax
    add rsi, 8192
    sub rbp, 2
    jnz .pair
    HOST3 VMCALL_MAP_GPA_RANGE, r13, r12, 0
    or rbx, rax
    mov rbp, r12
    shr rbp, 1
    mov rsi, r13
.look:
    or rbx, [rsi]                        ; the VMM dropped it when it became private
    mov rax, [rsi + 4096]
    xor rax, rsi
    or rbx, rax
    mov qword ptr [rsi], 1
    add rsi, 8192
    dec rbp
    jnz .look
    dec r14
    jnz .round
    CHECK_EQ "conversions lose nothing and keep nothing", rbx, 0
    ret

; The second CPU: a page of the storm has zeros, its own address, that of the page before, or 1.
reader:
    mov r13, [slot_gpa]
.again:
    mov rsi, r13
    mov rcx, [reader_pages]
.page:
    mov rax, [rsi]
    cmp rax, 1
    jbe .good
    cmp rax, rsi
    je .good
    add rax, 4096
    cmp rax, rsi
    je .good
    lock inc qword ptr [bad]
.good:
    add rsi, 4096
    dec rcx
    jnz .page
    xor eax, eax
    cpuid                                ; an exit: the other CPU gets its turn
    cmp qword ptr [stop], 0
    je .again
.stop:
    cli
    hlt
    jmp .stop

.section bss
.align 16
reader_stack:   .skip READER_STACK
reader_pages:   .skip 8
stop:           .skip 8
bad:            .skip 8

.section rodata
.align 8
slot_gpa:
    .quad SLOT_TEST_GPA
