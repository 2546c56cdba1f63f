; smp: locked counters stay exact while the pages they are on move, with as many CPUs as there are
;
; Every CPU adds to shared counters (LOCK INC, LOCK XADD, a spin lock around a plain add, CMPXCHG) and to
; one of its own, while CPU 0 has the counters' pages migrated and swapped out. Without a host there is
; one CPU, which counts alone.
;
; param count=3000  additions per CPU and counter
; param cpus=8      at most so many
; param rounds=2    starts of all CPUs
; vmcalls: cpu_count start_cpu migrate swap_out
.include "runtime.inc"
.include "cpus.inc"

.equ C_INC, 0                            ; one page each
.equ C_XADD, 4096
.equ C_LOCKED, 8192
.equ C_CMPXCHG, 12288
.equ C_OWN, 16384                        ; plus 8 * CPU
.equ COUNTER_PAGES, 5
.equ PATIENCE, 1 << 28
.equ DISTURB_EVERY, 256

main:
    PARAM rax, "count", 3000
    AT_LEAST rax, 1
    mov [count], rax
    PARAM r15, "rounds", 2
    AT_LEAST r15, 1
    call count_cpus
    mov edi, COUNTER_PAGES
    call pages_alloc
    mov [counters], rax
    mov rdi, rax
    xor eax, eax
    mov ecx, COUNTER_PAGES * 512
    rep stosq
.round:
    call one_round
    dec r15
    jnz .round
    call check_counters
    ret

; r14 = CPUs that take part.
count_cpus:
    mov r14d, 1
    NEED_HOST "other CPUs", .end
    HOST0 VMCALL_CPU_COUNT
    mov r14, rax
    HOST_CHECK "cpu_count", 1
    test rax, rax
    jnz .served
    mov r14d, 1
.served:
    PARAM rcx, "cpus", MAX_CPUS
    AT_LEAST rcx, 1
    cmp rcx, MAX_CPUS
    jbe .limit
    mov ecx, MAX_CPUS
.limit:
    cmp r14, rcx
    jbe .end
    mov r14, rcx
.end:
    PRINT "smp: "
    PRINT_DEC r14
    PRINT " CPUs\n"
    ret

one_round:
    mov qword ptr [done], 0
    call start_cpus
    xor esi, esi
    call work
    mov ecx, PATIENCE
.wait:
    cmp [done], r14
    jae .all
    pause
    dec ecx
    jnz .wait
.all:
    CHECK_EQ "every CPU finished", qword ptr [done], r14
    inc qword ptr [rounds_done]
    ret

; `count` additions to each counter; rsi = this CPU. CPU 0 has the pages disturbed meanwhile.
work:
    push rbx
    mov r8, [counters]
    mov r9, [count]
.again:
    lock inc qword ptr [r8 + C_INC]
    mov eax, 1
    lock xadd [r8 + C_XADD], rax
    mov ecx, 1
.spin:
    xchg [r8 + C_LOCKED + 64], ecx
    test ecx, ecx
    jz .owner
    pause
    jmp .spin
.owner:
    inc qword ptr [r8 + C_LOCKED]
    mov dword ptr [r8 + C_LOCKED + 64], 0
    mov rax, [r8 + C_CMPXCHG]
.exchange:
    lea rcx, [rax + 1]
    lock cmpxchg [r8 + C_CMPXCHG], rcx
    jne .exchange
    inc qword ptr [r8 + rsi*8 + C_OWN]
    test esi, esi
    jnz .next
    test r9d, DISTURB_EVERY - 1
    jnz .next
    call disturb
.next:
    dec r9
    jnz .again
    lock inc qword ptr [done]
    pop rbx
    ret

; Migrates and swaps out in turn.           keeps all but rax
disturb:
    inc qword ptr [disturbances]
    test qword ptr [disturbances], 1
    jz .swap
    HOST2 VMCALL_MIGRATE, r8, COUNTER_PAGES
    ret
.swap:
    HOST2 VMCALL_SWAP_OUT, r8, COUNTER_PAGES
    ret

check_counters:
    mov r8, [counters]
    mov rcx, [count]
    imul rcx, [rounds_done]
    mov rdx, rcx
    imul rdx, r14
    CHECK_EQ "LOCK INC lost nothing", qword ptr [r8 + C_INC], rdx
    CHECK_EQ "LOCK XADD lost nothing", qword ptr [r8 + C_XADD], rdx
    CHECK_EQ "the spin lock let one in at a time", qword ptr [r8 + C_LOCKED], rdx
    CHECK_EQ "LOCK CMPXCHG lost nothing", qword ptr [r8 + C_CMPXCHG], rdx
    xor ebx, ebx
.cpu:
    CHECK_EQ "each CPU's own counter", qword ptr [r8 + rbx*8 + C_OWN], rcx
    inc rbx
    cmp rbx, r14
    jb .cpu
    ret

.section bss
count:          .skip 8
counters:       .skip 8
done:           .skip 8
rounds_done:    .skip 8
disturbances:   .skip 8
