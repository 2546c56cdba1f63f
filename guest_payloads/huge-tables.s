; huge-tables: memory whose tables the host gives up keeps its bytes, whoever else uses them
;
; Two processes that map the same GiB of hugetlbfs share a page table: who unmaps one page of it gives up all.
; And khugepaged takes the small entries of a huge page of shared memory away, with their table.
;
; param rounds=2    times that the table is shared and given up
; vmcalls: nr_hugepages hugetlb_create hugetlb_peer_read dontneed thp_enable protect khugepaged
.include "runtime.inc"

.equ HUGE_GPA, 0x80000000
.equ HUGE_VA, TEST_VA + 0x100000000
.equ HUGE_PAGES, 1 << 18
.equ FILE_PAGE, 0x400000
.equ KEY, 0x5EED

main:
    PARAM r15, "rounds", 2
    AT_LEAST r15, 1
    PASS "the guest runs without huge pages"
    NEED_HOST "huge pages", .end
    call small_entries
    call shared_table
.end:
    ret

; A 2M page of shared memory that the VMM maps by small entries, as it had changed the rights of one of them.
small_entries:
    mov r12d, FILE_PAGE
    mov rax, [riz*1 + FILE_PAGE + 2 * PAGE_SIZE]
    HOST2 VMCALL_THP_ENABLE, r12, 512
    HOST3 VMCALL_PROTECT, r12, 1, 1
    mov rax, [r12 + PAGE_SIZE]
    mov [before], rax
    HOST3 VMCALL_PROTECT, r12, 1, 3
    HOST0 VMCALL_KHUGEPAGED
    mov rax, [r12 + PAGE_SIZE]
    CHECK_EQ "small entries that went with their table", rax, qword ptr [before]
    ret

; Two pages of a GiB whose table another process shares; the first is dropped, the second stays.
shared_table:
    HOST1 VMCALL_NR_HUGEPAGES, 3
    cmp rax, 3                           ; or the kernel says that it has not got them
    jl .end
    mov rcx, HUGE_GPA
    HOST4 VMCALL_HUGETLB_CREATE, rcx, HUGE_PAGES, 1, 0
    test rax, rax
    js .end
    mov rdi, HUGE_VA
    mov esi, 2
    mov edx, pml4
    call walk_create
    mov rdx, HUGE_GPA + PTE_P + PTE_W + PTE_PS
    mov [rax], rdx
    add rdx, PAGE_2M
    mov [rax + 8], rdx
    xor ebx, ebx
    mov r12, HUGE_VA
    mov r13, HUGE_VA + PAGE_2M
.round:
    mov qword ptr [r12], KEY
    mov qword ptr [r13], KEY
    mov rcx, HUGE_GPA
    HOST2 VMCALL_HUGETLB_PEER_READ, rcx, 8
    sub rax, KEY
    or rbx, rax
    HOST2 VMCALL_DONTNEED, rcx, 512
    or rbx, rax
    mov rax, [r13]
    sub rax, KEY
    or rbx, rax
    dec r15
    jnz .round
    CHECK_EQ "a page beside one that was dropped", rbx, 0
.end:
    ret

.section bss
.align 8
before:         .skip 8
