; kvmclock: the time that KVM keeps in a page of the guest's is right, wherever the host takes the page
;
; The page is swapped out and moved between updates, and by other CPUs while they are under way; KVM writes it
; by the frame it finds there then, and nothing beside the 32 bytes of the clock.
;
; param rounds=8    updates, each after the page was taken away
; param storm=16    updates while other CPUs have the page taken away, if there are any
; vmcalls: swap_out migrate set_clock kvmclock_ctrl cpu_count start_cpu
.include "runtime.inc"
.include "cpus.inc"

.equ CLOCK, 0x40
.equ VERSION, CLOCK
.equ TSC_AT, CLOCK + 8
.equ SYSTEM_TIME, CLOCK + 16
.equ MUL, CLOCK + 24
.equ SHIFT, CLOCK + 28
.equ FLAGS, CLOCK + 29
.equ SECOND, 1000000000
.equ PATIENCE, 1 << 28

main:
    PARAM r12, "rounds", 8
    PASS "the guest runs without a clock"
    NEED_HOST "kvmclock", .end
    call page_alloc
    mov r13, rax
    mov rdi, r13
    mov esi, 11
    mov edx, CLOCK / 8
    call fill_words
    lea rdi, [r13 + CLOCK + 32]
    mov edx, 512 - CLOCK / 8 - 4
    call fill_words
    HOST1 VMCALL_KVMCLOCK_CTRL, 0
    CHECK_EQ "no clock is stopped before there is one", rax, 0
    lea rax, [r13 + CLOCK + 1]
    call write_msr
    movzx eax, byte ptr [r13 + VERSION]
    and eax, 1
    CHECK_EQ "the version is even", rax, 0
    mov eax, [r13 + MUL]
    test eax, eax
    setz al
    movzx eax, al
    CHECK_EQ "the scale is there", rax, 0
    call forward
    call away
    call moved
    call stopped
    call beside
    call off
    mov rdi, r13
    mov esi, 11
    mov edx, CLOCK / 8
    call check_words
    CHECK_EQ "what lies before it in the page is as it was", rax, 0
    lea rdi, [r13 + CLOCK + 32]
    mov edx, 512 - CLOCK / 8 - 4
    call check_words
    CHECK_EQ "what lies behind it, too", rax, 0
.end:
    ret

; rax = what MSR KVM_CLOCK_MSR shall hold.        changes rcx, rdx
write_msr:
    mov rdx, rax
    shr rdx, 32
    mov ecx, KVM_CLOCK_MSR
    wrmsr
    ret

; rax = the time in ns, as pvclock_clocksource_read does it.        changes rcx, rdx, rsi
read_clock:
    mov esi, [r13 + VERSION]
    test esi, 1
    jnz read_clock
    rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, [r13 + TSC_AT]
    mov cl, [r13 + SHIFT]
    shl rax, cl
    mov edx, [r13 + MUL]
    mul rdx
    shrd rax, rdx, 32
    add rax, [r13 + SYSTEM_TIME]
    cmp esi, [r13 + VERSION]
    jne read_clock
    ret

forward:
    xor ebx, ebx                         ; how often it went back
    mov ebp, 100
    call read_clock
    mov rdi, rax
.next:
    call read_clock
    cmp rax, rdi
    adc ebx, 0
    mov rdi, rax
    dec ebp
    jnz .next
    CHECK_EQ "time does not go back", rbx, 0
    ret

; The page goes, the clock is set, and shows the time that was set, and less than a second more.
away:
    xor ebx, ebx
    mov rbp, r12
.round:
    HOST2 VMCALL_SWAP_OUT, r13, 1
    test ebp, 1
    jz .gone
    mov rax, [r13 + 8]                   ; mapped again, and another frame still
    HOST2 VMCALL_MIGRATE, r13, 1
.gone:
    mov r14, SECOND
    imul r14, rbp
    HOST1 VMCALL_SET_CLOCK, r14
    or rbx, rax
    call read_clock
    sub rax, r14
    cmp rax, SECOND
    sbb rcx, rcx
    inc rcx
    add rbx, rcx
    dec rbp
    jnz .round
    CHECK_EQ "every update arrives in the page's present frame", rbx, 0
    mov rax, -1
    HOST1 VMCALL_SET_CLOCK, rax
    CHECK_EQ "a time out of range", rax, -EINVAL
    ret

; The guest puts its clock elsewhere, and back.
moved:
    call page_alloc
    push rax
    lea rax, [rax + CLOCK + 1]
    call write_msr
    mov rax, [rsp]
    xchg r13, [rsp]
    mov r13, rax
    HOST1 VMCALL_SET_CLOCK, SECOND
    call read_clock
    sub rax, SECOND
    cmp rax, SECOND
    sbb rbx, rbx
    pop r13
    mov r14d, [r13 + VERSION]
    HOST1 VMCALL_SET_CLOCK, SECOND
    mov eax, [r13 + VERSION]
    CHECK_EQ "the clock is written at its new place", rbx, -1
    CHECK_EQ "and not at the old one", rax, r14
    lea rax, [r13 + CLOCK + 1]
    call write_msr
    ret

; Other CPUs take the page away all the time.
beside:
    HOST0 VMCALL_CPU_COUNT
    mov r14, rax
    cmp r14, 2
    jb .end
    mov [clock_page], r13
    PARAM r15, "storm", 16
    call start_cpus
    xor ebx, ebx
    mov rbp, r15
.round:
    mov r15, SECOND
    imul r15, rbp
    HOST1 VMCALL_SET_CLOCK, r15
    or rbx, rax
    call read_clock
    sub rax, r15
    cmp rax, SECOND
    sbb rcx, rcx
    inc rcx
    add rbx, rcx
    dec rbp
    jns .round
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
    CHECK_EQ "updates arrive while others take the page away", rbx, 0
.end:
    ret

work:
    HOST2 VMCALL_SWAP_OUT, qword ptr [clock_page], 1
    cmp byte ptr [enough], 0
    je work
    lock inc qword ptr [done]
    ret

stopped:
    HOST2 VMCALL_SWAP_OUT, r13, 1
    HOST1 VMCALL_KVMCLOCK_CTRL, 0
    CHECK_EQ "a pause is told", rax, 1
    movzx eax, byte ptr [r13 + FLAGS]
    and eax, KVM_CLOCK_STOPPED
    CHECK_EQ "and shows", rax, KVM_CLOCK_STOPPED
    HOST1 VMCALL_SET_CLOCK, 5
    movzx eax, byte ptr [r13 + FLAGS]
    and eax, KVM_CLOCK_STOPPED
    CHECK_EQ "until the guest takes note", rax, KVM_CLOCK_STOPPED
    and byte ptr [r13 + FLAGS], ~KVM_CLOCK_STOPPED & 0xff
    HOST1 VMCALL_SET_CLOCK, 5
    movzx eax, byte ptr [r13 + FLAGS]
    and eax, KVM_CLOCK_STOPPED
    CHECK_EQ "and not any more after that", rax, 0
    mov rax, 1000
    HOST1 VMCALL_KVMCLOCK_CTRL, rax
    CHECK_EQ "no such CPU", rax, -EINVAL
    ret

off:
    xor eax, eax
    call write_msr
    mov r14d, [r13 + VERSION]
    HOST1 VMCALL_SET_CLOCK, 7
    mov eax, [r13 + VERSION]
    CHECK_EQ "a clock that is off is not written", rax, r14
    ret

.section bss
.align 8
clock_page:     .skip 8
done:           .skip 8
enough:         .skip 8
