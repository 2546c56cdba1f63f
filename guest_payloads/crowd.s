; crowd: sixteen CPUs keep their words in pages that the host never leaves alone
;
; Every CPU has a word of its own in each shared page, finds there in each pass what it stored in the pass before,
; and adds to a counter that all share. CPU 0 has the pages migrated, swapped out, aged and forked after each of
; its passes, so that notifiers zap under fifteen others. Without a host there is one CPU.
;
; param cpus=16     at most so many
; param pages=4     shared pages
; param passes=20   of every CPU over all pages
; param weather=0   ns between two things that the host does by itself, about; 0 for none
; vmcalls: cpu_count start_cpu migrate swap_out age fork child_exit weather
.include "runtime.inc"

.equ CROWD, 16
.equ SHARED_COUNTER, 1024                ; of each page; behind the words
.equ CROWD_STACK, 1024
.equ PATIENCE, 1 << 28
.equ START_PATIENCE, 1 << 24

main:
    PARAM rax, "pages", 4
    AT_LEAST rax, 1
    mov [nr_pages], rax
    PARAM rcx, "passes", 20
    AT_LEAST rcx, 1
    mov [passes], rcx
    mov rdi, [nr_pages]
    call pages_alloc
    mov [base], rax
    mov rdi, rax
    mov rcx, [nr_pages]
    shl rcx, 9
    xor eax, eax
    rep stosq
    call count_cpus
    PARAM rax, "weather", 0
    test rax, rax
    jz .calm
    HOST1 VMCALL_WEATHER, rax
.calm:
    call start_crowd
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
    CHECK_EQ "every CPU found its words", qword ptr [bad], 0
    mov rbx, [passes]
    imul rbx, r14
    mov rsi, [base]
    mov rcx, [nr_pages]
    xor edx, edx
.page:
    mov rax, [rsi + SHARED_COUNTER]
    xor rax, rbx
    or rdx, rax
    add rsi, 4096
    dec rcx
    jnz .page
    CHECK_EQ "no addition is lost", rdx, 0
    ret

; r14 = CPUs that take part.
count_cpus:
    mov r14d, 1
    NEED_HOST "other CPUs", .end
    mov byte ptr [disturbing], 1
    HOST0 VMCALL_CPU_COUNT
    mov r14, rax
    PARAM rcx, "cpus", CROWD
    AT_LEAST rcx, 1
    cmp rcx, CROWD
    jbe .limit
    mov ecx, CROWD
.limit:
    cmp r14, rcx
    jbe .end
    mov r14, rcx
.end:
    PRINT "crowd: "
    PRINT_DEC r14
    PRINT " CPUs\n"
    ret

start_crowd:
    mov ebx, 1
    xor ebp, ebp
.cpu:
    cmp rbx, r14
    jae .end
    mov edi, START_PATIENCE
    mov rdx, rbx
    inc rdx
    imul rdx, rdx, CROWD_STACK
    add rdx, stacks
.try:
    HOST4 VMCALL_START_CPU, rbx, crowd_entry, rdx, 0
    cmp rax, -EBUSY
    jne .answer
    pause
    dec edi
    jnz .try
.answer:
    or rbp, rax
    inc rbx
    jmp .cpu
.end:
    CHECK_EQ "all start", rbp, 0
    ret

; Where the others start: rsi = which one this is. They take no interrupts and make no faults of their own.
crowd_entry:
    call work
.stop:
    cli
    hlt
    jmp .stop

work:
    mov r9, [passes]
    xor r11d, r11d                       ; what this CPU stored last
.pass:
    mov r8, [base]
    mov rcx, [nr_pages]
.page:
    cmp [r8 + rsi*8], r11
    je .good
    lock inc qword ptr [bad]
.good:
    lea rdx, [r11 + 1]
    mov [r8 + rsi*8], rdx
    lock inc qword ptr [r8 + SHARED_COUNTER]
    add r8, 4096
    dec rcx
    jnz .page
    inc r11
    test esi, esi
    jnz .next
    call disturb
.next:
    xor eax, eax
    cpuid                                ; an exit: others get their turn
    dec r9
    jnz .pass
    lock inc qword ptr [done]
    ret

; One thing after the other.                keeps all but rax, rcx, r10
disturb:
    cmp byte ptr [disturbing], 0
    je .end
    mov rcx, r11
    and ecx, 3
    mov r10, [base]
    cmp ecx, 1
    je .swap
    ja .more
    HOST2 VMCALL_MIGRATE, r10, qword ptr [nr_pages]
    ret
.swap:
    HOST2 VMCALL_SWAP_OUT, r10, qword ptr [nr_pages]
    ret
.more:
    cmp ecx, 3
    je .fork
    HOST2 VMCALL_AGE, r10, qword ptr [nr_pages]
    ret
.fork:
    HOST0 VMCALL_FORK
    HOST0 VMCALL_CHILD_EXIT
.end:
    ret

.section bss
.align 16
stacks:     .skip CROWD * CROWD_STACK
base:       .skip 8
nr_pages:   .skip 8
passes:     .skip 8
done:       .skip 8
bad:        .skip 8
disturbing: .skip 1
