; apic: the local APIC's registers are what they were, wherever the host takes the page that stands for them
;
; The CPU virtualizes the registers: KVM keeps them in a page of its own, and a second page, of the VMM, only
; tells the CPU which accesses they are. The host swaps that one out and moves it, here and while other CPUs
; use their APICs. A machine has one with --param kvm_intel.enable_apicv=Y.
;
; param rounds=8    times that the page is taken away
; param storm=16    times more beside the other CPUs, if there are any
; vmcalls: apic_page cpu_count start_cpu
.include "runtime.inc"
.include "cpus.inc"

.equ ID, 0x20
.equ VERSION, 0x30
.equ TASK_PRIORITY, 0x80
.equ PRIORITY, 0xA0
.equ EOI, 0xB0
.equ SPURIOUS, 0xF0
.equ LVT_TIMER, 0x320
.equ INITIAL_COUNT, 0x380
.equ THE_VERSION, 0x50014
.equ CPUID_APIC, 9
.equ PATIENCE, 1 << 28

main:
    PARAM r12, "rounds", 8
    PASS "the guest runs without using its APIC"
    NEED_HOST "the APIC's page", .end
    mov eax, 1
    xor ecx, ecx
    cpuid
    bt edx, CPUID_APIC
    jc .present
    PASS "this machine has no local APIC"
    jmp .end
.present:
    mov r13, [apic]
    call registers
    call taken
    call beside
.end:
    ret

registers:
    mov eax, [r13 + ID]
    CHECK_EQ "the ID", rax, 0
    mov eax, [r13 + VERSION]
    CHECK_EQ "the version", rax, THE_VERSION
    mov dword ptr [r13 + TASK_PRIORITY], 0x20
    mov eax, [r13 + TASK_PRIORITY]
    CHECK_EQ "the task's priority", rax, 0x20
    or dword ptr [r13 + TASK_PRIORITY], 1
    mov eax, [r13 + TASK_PRIORITY]
    CHECK_EQ "a read-modify-write", rax, 0x21
    mov eax, 0x1AB
    mov [r13 + SPURIOUS], eax
    mov eax, [r13 + SPURIOUS]
    CHECK_EQ "the spurious vector", rax, 0x1AB
    mov eax, -1
    mov [r13 + LVT_TIMER], eax
    mov eax, [r13 + LVT_TIMER]
    CHECK_EQ "bits that a register has not", rax, 0x700FF
    mov dword ptr [r13 + VERSION], 7
    mov eax, [r13 + VERSION]
    CHECK_EQ "what is for reading only", rax, THE_VERSION
    mov dword ptr [r13 + EOI], 0
    PASS "an EOI is taken"
    mov eax, [r13 + ID + 4]
    CHECK_EQ "beside a register there is nothing", rax, 0
    ret

; The page goes; the registers stay.
taken:
    xor ebx, ebx
    mov rbp, r12
    test rbp, rbp
    jz .done
.round:
    mov rcx, rbp
    and ecx, 1
    HOST1 VMCALL_APIC_PAGE, rcx
    mov eax, ebp
    mov [r13 + INITIAL_COUNT], eax
    cmp [r13 + INITIAL_COUNT], eax
    je .count
    inc ebx
.count:
    cmp dword ptr [r13 + VERSION], THE_VERSION
    je .version
    inc ebx
.version:
    cmp dword ptr [r13 + TASK_PRIORITY], 0x21
    je .next
    inc ebx
.next:
    dec rbp
    jnz .round
.done:
    CHECK_EQ "wherever the page is, the registers are there", rbx, 0
    HOST1 VMCALL_APIC_PAGE, 2
    CHECK_EQ "no such way to take it", rax, -EINVAL
    ret

; Other CPUs look at their APICs meanwhile.
beside:
    HOST0 VMCALL_CPU_COUNT
    mov r14, rax
    cmp r14, 2
    jb .end
    PARAM rbp, "storm", 16
    call start_cpus
    test rbp, rbp
    jz .enough
.round:
    mov rcx, rbp
    and ecx, 1
    HOST1 VMCALL_APIC_PAGE, rcx
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
    CHECK_EQ "no CPU saw the page itself", qword ptr [wrong], 0
.end:
    ret

; rsi = this CPU.
work:
    mov rdi, [apic]
    shl esi, 24
.again:
    cmp [rdi + ID], esi
    je .id
    lock inc qword ptr [wrong]
.id:
    cmp dword ptr [rdi + VERSION], THE_VERSION
    je .version
    lock inc qword ptr [wrong]
.version:
    mov [rdi + INITIAL_COUNT], esi
    cmp byte ptr [enough], 0
    je .again
    lock inc qword ptr [done]
    ret

.section rodata
.align 8
apic:           .quad APIC_GPA

.section bss
.align 8
done:           .skip 8
wrong:          .skip 8
enough:         .skip 8
