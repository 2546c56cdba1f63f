; counters: every CPU checks and increments a word of its own in each of many pages, and a shared one
;
; It asks the host for nothing but the other CPUs: what happens to the pages happens from outside. A word in
; a slot that comes and goes reads as SLOT_WORD, as zeros before anybody stored it, or as ones.
;
; param pages=48    how many pages
; param passes=40   increments per word
; vmcalls: cpu_count start_cpu
.include "runtime.inc"
.include "cpus.inc"

.equ SHARED_WORD, 512
.equ SLOT_WORD, 0x5107

main:
    PARAM rax, "pages", 48
    mov [nr_pages], rax
    mov rdi, rax
    PARAM rax, "passes", 40
    mov [passes], rax
    call pages_alloc
    mov [memory], rax
    mov rdi, rax
    mov rcx, [nr_pages]
    shl rcx, 9
    xor eax, eax
    rep stosq
    HOST0 VMCALL_CPU_COUNT
    mov r14, rax
    call start_cpus
    xor esi, esi
    call work
.wait:
    pause
    cmp [done], r14
    jb .wait
    CHECK_EQ "wrong words", qword ptr [wrong], 0
    CHECK_EQ "wrong words of the slot", qword ptr [wrong_slot], 0
    imul r14, [passes]
    mov rdi, [memory]
    mov rcx, [nr_pages]
    xor ebx, ebx
.total:
    cmp [rdi + SHARED_WORD], r14
    je .right
    inc rbx
.right:
    add rdi, PAGE_SIZE
    dec rcx
    jnz .total
    CHECK_EQ "wrong totals", rbx, 0
    ret

; rsi = this CPU
work:
    push rbx
    xor ebx, ebx
.pass:
    mov rdi, [memory]
    mov rcx, [nr_pages]
.page:
    cmp [rdi + rsi*8], rbx
    je .good
    lock inc qword ptr [wrong]
.good:
    inc qword ptr [rdi + rsi*8]
    lock inc qword ptr [rdi + SHARED_WORD]
    add rdi, PAGE_SIZE
    dec rcx
    jnz .page
    mov rdi, [slot_gpa]
    mov rax, [rdi]
    test rax, rax
    jz .store
    cmp rax, -1
    je .store
    cmp rax, SLOT_WORD
    je .store
    lock inc qword ptr [wrong_slot]
.store:
    mov qword ptr [rdi], SLOT_WORD
    inc rbx
    cmp rbx, [passes]
    jb .pass
    lock inc qword ptr [done]
    pop rbx
    ret

.section rodata
.align 8
slot_gpa:   .quad SLOT_TEST_GPA

.section bss
nr_pages:       .skip 8
passes:         .skip 8
memory:         .skip 8
done:           .skip 8
wrong:          .skip 8
wrong_slot:     .skip 8
