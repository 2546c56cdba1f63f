; race: what a CPU stored is there when it looks again, whatever two CPUs ask the host for meanwhile
;
; Every CPU has one word in each shared page, checks in each pass what it had stored and stores anew.
; CPUs 0 and 1 ask the host for something after each pass, at random among what `ops` and `ops1` allow.
; For machines that switch tasks at random places: --vcpus 3 --param sched.strategy=random.
;
; param rounds=40   requests by CPU 0 and by CPU 1
; param pages=4     shared pages
; param seed=1      of the choices
; param ops=245759  what CPU 0 may ask for, a bit each
; param ops1=245759 what CPU 1 may ask for
; param linger=30000 ns from pin to unpin
; vmcalls: cpu_count start_cpu migrate swap_out fork child_exit host_write dontneed slot_create slot_delete slot_restore host_read reclaim dirty_log get_dirty age mirror_read dma_write kvm_map_write mremap ksm_merge
.include "runtime.inc"
.include "cpus.inc"

.equ PATIENCE, 1 << 20
.equ NR_OPS, 18
.equ ALL_OPS, (1 << NR_OPS) - 1
.equ FLIP_PAGES, 2
.equ FLIP_VALUE, 0x5a5a00                ; plus the CPU
.equ HOST_WORD, 1024                     ; offsets of words that others store, plus 8 * CPU
.equ DMA_WORD, 2048
.equ MAP_WORD, 3072
.equ RECLAIM_PAGES, 64
.equ TRIPS, 4

main:
    PARAM rax, "rounds", 40
    AT_LEAST rax, 1
    mov [rounds], rax
    PARAM r12, "pages", 4
    AT_LEAST r12, 1
    mov [nr_pages], r12
    PARAM rax, "seed", 1
    mov [rng_state], rax
    PARAM rax, "ops", 245759
    and eax, ALL_OPS
    mov [ops], rax
    PARAM rax, "ops1", 245759
    and eax, ALL_OPS
    mov [ops + 8], rax
    mov rdi, r12
    call pages_alloc
    mov [shared], rax
    mov rdi, rax
    xor eax, eax
    mov rcx, r12
    shl rcx, 9
    rep stosq
    mov edi, MAX_CPUS
    call pages_alloc
    mov [scratch], rax
    mov edi, 2
    call pages_alloc
    mov [twins], rax
    mov rdi, rax
    xor eax, eax
    mov ecx, 2 * 512
    rep stosq
    PARAM rax, "linger", 30000
    mov [linger], rax
    call find_cpus
    call start_cpus
    xor esi, esi
    call work
    mov ecx, PATIENCE
.wait:
    cmp [done], r14
    jae .all
    push rcx
    xor eax, eax
    cpuid
    pop rcx
    dec ecx
    jnz .wait
.all:
    HOST0 VMCALL_CHILD_EXIT              ; where one is left
    CHECK_EQ "every CPU finished", qword ptr [done], r14
    CHECK_EQ "the CPUs' own words", qword ptr [bad_own], 0
    CHECK_EQ "a slot that comes and goes", qword ptr [bad_flip], 0
    CHECK_EQ "memory that the VMM discards", qword ptr [bad_scratch], 0
    CHECK_EQ "words that the VMM stores", qword ptr [bad_host], 0
    CHECK_EQ "words that a device stores", qword ptr [bad_dma], 0
    CHECK_EQ "words that KVM stores", qword ptr [bad_map], 0
    CHECK_EQ "what a mirroring device reads", qword ptr [bad_mirror], 0
    CHECK_EQ "pages that the host merges", qword ptr [bad_twin], 0
    ret

; r14 = CPUs that take part; makes the slot.
find_cpus:
    mov r14d, 1
    mov qword ptr [operators], 1
    NEED_HOST "a host to race with", .end
    HOST2 VMCALL_SLOT_CREATE, qword ptr [slot_gpa], FLIP_PAGES
    test rax, rax
    js .count
    mov [slot], rax
    mov rax, [slot_gpa]
    mov [flip], rax
.count:
    HOST0 VMCALL_CPU_COUNT
    test rax, rax
    jle .end
    mov r14, rax
    cmp r14, MAX_CPUS
    jbe .limit
    mov r14d, MAX_CPUS
.limit:
    cmp r14, 2
    jb .end
    mov qword ptr [operators], 2
.end:
    ret

; rsi = this CPU. In it r15 = this CPU, r13 = what its words hold, rbx = what it may ask for.
work:
    push rbx
    push r13
    push r14
    push r15
    mov r15, rsi
    xor r13d, r13d
    xor ebx, ebx
    cmp r15, 2
    jae .follow
    mov rbx, [ops + r15*8]
    mov r14, [rounds]
.round:
    call pass
    test rbx, rbx
    jz .none
    call ask
.none:
    dec r14
    jnz .round
    lock inc qword ptr [operators_done]
.follow:
    call pass
    xor eax, eax
    push rbx
    cpuid                                ; leaves the guest, so that others get on
    pop rbx
    mov rax, [operators_done]
    cmp rax, [operators]
    jb .follow
    lock inc qword ptr [done]
    pop r15
    pop r14
    pop r13
    pop rbx
    ret

; Checks and stores this CPU's words.       changes rax, rcx, rdi, r13
pass:
    mov rdi, [shared]
    lea rdi, [rdi + r15*8]
    mov rcx, [nr_pages]
.page:
    cmp [rdi], r13
    je .good
    lock inc qword ptr [bad_own]
.good:
    lea rax, [r13 + 1]
    mov [rdi], rax
    add rdi, PAGE_SIZE
    dec rcx
    jnz .page
    inc r13
    mov rdi, [flip]
    test rdi, rdi
    jz .end
    mov rax, [operators]                 ; two operators leave the slot to the others
    cmp rax, 1
    je .visit
    cmp r15, rax
    jb .end
.visit:
    mov eax, r13d
    and eax, FLIP_PAGES - 1
    shl eax, 12
    add rdi, rax
    lea rdi, [rdi + r15*8]
    lea rcx, [r15 + FLIP_VALUE]
    mov rax, [rdi]
    test rax, rax                        ; not stored yet, or discarded
    jz .store
    cmp rax, -1                          ; the slot is away
    je .store
    cmp rax, rcx
    je .store
    lock inc qword ptr [bad_flip]
.store:
    mov [rdi], rcx
.end:
    ret

; Asks for one of the things in rbx.        changes rax, rcx, rdx, rdi
ask:
    call rng_next
    xor edx, edx
    mov ecx, NR_OPS
    div rcx
    bt rbx, rdx
    jnc ask
    mov rax, [requests + rdx*8]
    jmp rax

; rdi = a random shared page.               changes rax, rdx
random_page:
    call rng_next
    xor edx, edx
    div qword ptr [nr_pages]
    shl rdx, 12
    mov rdi, [shared]
    add rdi, rdx
    ret

ask_migrate:
    call random_page
    HOST2 VMCALL_MIGRATE, rdi, 1
    ret

ask_swap:
    HOST2 VMCALL_SWAP_OUT, qword ptr [shared], qword ptr [nr_pages]
    ret

ask_fork:
    HOST0 VMCALL_FORK
    cmp rax, -EBUSY
    jne .end
    HOST0 VMCALL_CHILD_EXIT
.end:
    ret

; The VMM loads and stores, the guest loads, the VMM discards.
ask_discard:
    mov rdi, r15
    shl rdi, 12
    add rdi, [scratch]
    HOST2 VMCALL_HOST_READ, rdi, 4
    HOST3 VMCALL_HOST_WRITE, rdi, 77, 4
    test rax, rax
    js .end
    cmp dword ptr [rdi], 77
    jne .bad
    HOST2 VMCALL_DONTNEED, rdi, 1
    cmp qword ptr [rdi], 0
    je .end
.bad:
    lock inc qword ptr [bad_scratch]
.end:
    ret

ask_slot:
    HOST1 VMCALL_SLOT_DELETE, qword ptr [slot]
    HOST1 VMCALL_SLOT_RESTORE, qword ptr [slot]
    ret

ask_slot_migrate:
    HOST2 VMCALL_MIGRATE, qword ptr [flip], FLIP_PAGES
    ret

ask_slot_discard:
    HOST2 VMCALL_DONTNEED, qword ptr [flip], FLIP_PAGES
    ret

ask_log:
    xor qword ptr [logging], 1
    HOST2 VMCALL_DIRTY_LOG, qword ptr [shared], qword ptr [logging]
    HOST3 VMCALL_GET_DIRTY, qword ptr [shared], qword ptr [nr_pages], 0
    ret

ask_age:
    HOST2 VMCALL_AGE, qword ptr [shared], qword ptr [nr_pages]
    ret

ask_mirror:
    call random_page
    lea rdi, [rdi + r15*8]
    HOST2 VMCALL_MIRROR_READ, rdi, 8
    test rax, rax
    js .end
    cmp rax, r13
    je .end
    lock inc qword ptr [bad_mirror]
.end:
    ret

; The VMM reads this CPU's word that the VMM stores, and stores to it.
ask_store:
    call random_page
    lea rdi, [rdi + r15*8 + HOST_WORD]
    HOST2 VMCALL_HOST_READ, rdi, 8
    test rax, rax
    js .end
    cmp [rdi], rax
    jne .bad
    HOST3 VMCALL_HOST_WRITE, rdi, r13, 4
    test rax, rax
    js .end
    cmp [rdi], r13d
    je .end
.bad:
    lock inc qword ptr [bad_host]
.end:
    ret

ask_dma:
    call random_page
    lea rdi, [rdi + r15*8 + DMA_WORD]
    HOST4 VMCALL_DMA_WRITE, rdi, r13, 8, qword ptr [linger]
    test rax, rax
    js .end
    cmp [rdi], r13
    je .end
    lock inc qword ptr [bad_dma]
.end:
    ret

; The VMM stores, the page goes to swap and comes back.
ask_cycle:
    mov rdi, r15
    shl rdi, 12
    add rdi, [scratch]
    HOST3 VMCALL_HOST_WRITE, rdi, 78, 4
    test rax, rax
    js .end
    mov ecx, TRIPS
.trip:
    HOST2 VMCALL_SWAP_OUT, rdi, 1        ; from the second trip on there is nothing to write
    HOST2 VMCALL_HOST_READ, rdi, 4
    cmp rax, 78
    je .back
    lock inc qword ptr [bad_scratch]
.back:
    dec ecx
    jnz .trip
.end:
    ret

ask_reclaim:
    HOST1 VMCALL_RECLAIM, RECLAIM_PAGES
    ret

; In a shared page, or in the one that CPU 0 has taken to swap and back.
ask_map:
    call rng_next
    mov rcx, [nr_pages]
    inc rcx
    xor edx, edx
    div rcx
    mov rdi, [scratch]
    sub rdx, 1
    jb .chosen
    shl rdx, 12
    mov rdi, [shared]
    add rdi, rdx
.chosen:
    lea rdi, [rdi + r15*8 + MAP_WORD]
    HOST4 VMCALL_KVM_MAP_WRITE, rdi, r13, 8, qword ptr [linger]
    test rax, rax
    js .end
    cmp [rdi], r13
    je .end
    lock inc qword ptr [bad_map]
.end:
    ret

; The VMM has a translation of the page when its memory moves away and back.
ask_mremap:
    call random_page
    HOST2 VMCALL_HOST_READ, rdi, 4
    HOST2 VMCALL_MREMAP, qword ptr [shared], qword ptr [nr_pages]
    ret

; The twins are equal but while a request for one of them is under way.
ask_merge:
    HOST3 VMCALL_KSM_MERGE, qword ptr [twins], 2, 0
    jmp check_twins

; A device stores a word of the one, the guest the same of the other.
ask_twin:
    mov rdi, [twins]
    lea rdi, [rdi + r15*8]
    HOST4 VMCALL_DMA_WRITE, rdi, r13, 8, qword ptr [linger]
    test rax, rax
    js check_twins
    mov rax, [twin_words + r15*8]
    cmp [rdi + PAGE_SIZE], rax           ; only the one
    je .other
    lock inc qword ptr [bad_twin]
.other:
    mov [rdi + PAGE_SIZE], r13
    mov [twin_words + r15*8], r13
check_twins:
    mov rdi, [twins]
    lea rdi, [rdi + r15*8]
    mov rax, [twin_words + r15*8]
    cmp [rdi], rax
    jne .bad
    cmp [rdi + PAGE_SIZE], rax
    je .end
.bad:
    lock inc qword ptr [bad_twin]
.end:
    ret

.section rodata
.align 8
slot_gpa:       .quad SLOT_TEST_GPA
requests:                                ; bit 0 first
    .quad ask_migrate
    .quad ask_swap
    .quad ask_fork
    .quad ask_discard
    .quad ask_slot
    .quad ask_slot_migrate
    .quad ask_slot_discard
    .quad ask_log
    .quad ask_age
    .quad ask_mirror
    .quad ask_store
    .quad ask_dma
    .quad ask_cycle
    .quad ask_reclaim
    .quad ask_map
    .quad ask_mremap
    .quad ask_merge
    .quad ask_twin

.section bss
rounds:         .skip 8
nr_pages:       .skip 8
shared:         .skip 8
scratch:        .skip 8
twins:          .skip 8
twin_words:     .skip 16                 ; of CPUs 0 and 1
slot:           .skip 8
flip:           .skip 8
logging:        .skip 8
linger:         .skip 8
ops:            .skip 16
operators:      .skip 8
operators_done: .skip 8
done:           .skip 8
bad_own:        .skip 8
bad_flip:       .skip 8
bad_scratch:    .skip 8
bad_host:       .skip 8
bad_dma:        .skip 8
bad_map:        .skip 8
bad_mirror:     .skip 8
bad_twin:       .skip 8
