; everything: whatever the host is asked for, in whatever order, every byte is what the guest stored last
;
; There are regions of anonymous memory, of a memfd, of a file mapped shared and private, and of huge pages
; of hugetlbfs, with a pattern of its own in each page. The guest chooses one of the operations that a host
; knows and a piece of a region at random, uses the piece, so that KVM maps it, asks for the operation, and
; then reads every byte of the piece and of some other pages. At the end it reads all.
;
; param ops=1000    operations
; param seed=1      of the choices and the patterns
; param pages=1024  the anonymous region, which begins at a multiple of 2 MiB
; param only=999    the number of the one operation to ask for; 999 for all of them
; param kinds=31    which regions: 1 anonymous, 2 memfd, 4 file, 8 private file, 16 hugetlbfs
; param weather=0   ns between two things the host does by itself, about; 0 for none
; vmcalls: swap_out migrate dontneed age reclaim fork child_exit host_read host_write dirty_log get_dirty protect slot_create slot_delete slot_restore slot_move weather cold free mremap mlock munlock clear_refs
; vmcalls: mirror_read dma_write kvm_map_write dune_read dune_write sva_read sva_write rdma_register rdma_deregister rdma_peer_read rdma_peer_write rdma_peer_add device_migrate device_read device_write device_add pfnmap_create pfnmap_revoke
; vmcalls: ksm_merge ksm_unmerge page_idle_set page_idle_get damon numa_balance vcpu_node pages_on_node pagemap_scan uffd_missing uffd_move uffd_wp uffd_read uffd_end
; vmcalls: memfd_create file_create file_write peer_write fsync fadvise_dontneed punch_hole remove truncate nr_hugepages hugetlb_create hugetlb_peer_read hugetlb_peer_write hugetlb_sharers hugetlb_unshare
; vmcalls: compact contig_alloc contig_free mbind offline online pin unpin soft_offline memory_failure uffd_minor
; vmcalls: thp_enable collapse thp_split khugepaged
; vmcalls: lru_gen_enable lru_gen_age lru_gen_evict memcg_limit memcg_reclaim zswap_enable zswap_writeback oom_kill
.include "runtime.inc"
.include "kernel.inc"

.equ OTHERS, 4                           ; pages that are looked at beside the piece
.equ SLOT_PAGES, 2

; What an operation leaves in the pages of its piece.
.equ SAME, 0
.equ ZEROS, 1
.equ ANYTHING, 2                         ; old bytes or zeros, until they are written again

; Kinds of regions.
.equ ANON, 1
.equ SHMEM, 2
.equ FILE, 4
.equ PRIVATE, 8
.equ HUGE, 16
.equ FILES, SHMEM | FILE
.equ SMALL, ANON | FILES | PRIVATE
.equ EVERY, SMALL | HUGE
.equ PINNABLE, ANON | SHMEM | PRIVATE     ; no pin for long where a file must know of writes

; A region: where it is, its pages (0: there is none), a seed a page, its kind.
.equ RG_GPA, 0
.equ RG_PAGES, 8
.equ RG_SEEDS, 16
.equ RG_KIND, 24
.equ RG_SIZE, 32
.equ NR_REGIONS, 5
.equ FILE_PAGES, 64
.equ HUGE_PAGES, 1024
.equ MEMFD_GPA, SLOT_TEST_GPA + 0x200000
.equ FILE_GPA, SLOT_TEST_GPA + 0x300000
.equ PRIVATE_GPA, SLOT_TEST_GPA + 0x400000
.equ HUGE_GPA, SLOT_TEST_GPA + 0xA00000

; An operation: its name, the routine that asks, the vmcall that `range`, `plain`, `reads` and `stores` make,
; pages of the largest piece, what it leaves there, the regions it is for.
.macro OPERATION name, ask, nr, pages, leaves, kinds
    .quad \name, \ask, \nr, \pages, \leaves, \kinds
.endm
.equ OP_NAME, 0
.equ OP_ASK, 8
.equ OP_NR, 16
.equ OP_PAGES, 24
.equ OP_LEAVES, 32
.equ OP_KINDS, 40
.equ OP_SIZE, 48

main:
    PARAM r14, "ops", 1000
    PARAM rax, "seed", 1
    mov [rng_state], rax
    PARAM rax, "pages", 1024
    AT_LEAST rax, 16
    mov [nr_pages], rax
    PARAM rax, "only", 999
    mov [only], rax
    PARAM rax, "kinds", 31
    mov [kinds], rax
    NEED_HOST "a host to ask", .end
    call make_regions
    call make_slot
    call make_bar
    PARAM rax, "weather", 0
    test rax, rax
    jz .next
    HOST1 VMCALL_WEATHER, rax
.next:
    call one_operation
    dec r14
    jnz .next
    HOST0 VMCALL_CHILD_EXIT              ; where one is left
    HOST0 VMCALL_UFFD_END
    call check_all
    call report
    CHECK_EQ "every byte is what was stored last", qword ptr [bad_words], 0
    CHECK_EQ "what others read and stored", qword ptr [bad_others], 0
    CHECK_EQ "a slot that comes, goes and moves", qword ptr [bad_slot], 0
.end:
    ret

; Nobody writes to them: untouched memory reads as zeros. What the host cannot make stays empty.
make_regions:
    mov rax, [heap_next]
    add rax, PAGE_2M - 1
    and rax, -PAGE_2M
    mov [heap_next], rax
    mov rdi, [nr_pages]
    call pages_alloc
    mov r15d, regions
    mov rdi, [nr_pages]
    mov esi, ANON
    call add_region
    HOST2 VMCALL_MEMFD_CREATE, qword ptr [gpas], FILE_PAGES
    mov rdi, FILE_PAGES
    mov esi, SHMEM
    mov rcx, [gpas]
    call add_made
    HOST3 VMCALL_FILE_CREATE, qword ptr [gpas + 8], FILE_PAGES, 0
    mov esi, FILE
    mov rcx, [gpas + 8]
    call add_made
    HOST3 VMCALL_FILE_CREATE, qword ptr [gpas + 16], FILE_PAGES, 1
    mov esi, PRIVATE
    mov rcx, [gpas + 16]
    call add_made
    HOST1 VMCALL_NR_HUGEPAGES, HUGE_PAGES / 512
    HOST4 VMCALL_HUGETLB_CREATE, qword ptr [gpas + 24], HUGE_PAGES, 1, 1
    mov edi, HUGE_PAGES
    mov esi, HUGE
    mov rcx, [gpas + 24]
    call add_made
    ret

; The region of kind esi with rdi pages at rcx, if rax is no errno.    changes rax, rcx
add_made:
    test rax, rax
    js .absent
    mov rax, rcx
    jmp add_region
.absent:
    add r15, RG_SIZE
    ret

; The region of kind esi with rdi pages at rax, and the next one.      changes rax, rcx
add_region:
    mov ecx, esi
    and rcx, [kinds]
    jz .left_out
    mov [r15 + RG_GPA], rax
    mov [r15 + RG_PAGES], rdi
    mov ecx, esi
    mov [r15 + RG_KIND], rcx
    push rdi
    add rdi, 511
    shr rdi, 9
    call pages_alloc
    pop rdi
    mov [r15 + RG_SEEDS], rax
    push rdi
    mov rcx, rdi
    mov rdi, rax
    xor eax, eax
    rep stosq
    pop rdi
.left_out:
    add r15, RG_SIZE
    ret

make_slot:
    HOST2 VMCALL_SLOT_CREATE, qword ptr [slot_gpa], SLOT_PAGES
    mov [slot], rax
    test rax, rax
    js .end
    mov rax, [slot_gpa]
    mov [slot_at], rax
    mov [rax], rax
.end:
    ret

make_bar:
    HOST2 VMCALL_PFNMAP_CREATE, qword ptr [bar_gpa], 1
    mov [bar_slot], rax
    ret

; One operation on one piece: rbp = its entry of the table, r15 = its region, r12 = gpa, r13 = pages.
one_operation:
    push rbp
    push r12
    push r13
    push r15
    call choose
    test r15, r15
    jz .end
    call use_pages
    mov rdi, r12
    mov rsi, r13
    call qword ptr [rbp + OP_ASK]
    call count_answer
    test rax, rax
    js .look
    cmp qword ptr [rbp + OP_LEAVES], SAME
    je .look
    cmp qword ptr [rbp + OP_LEAVES], ZEROS
    je .zeros
    call write_pages
    jmp .look
.zeros:
    call forget_pages
.look:
    call check_pages
    mov ebx, OTHERS
.other:
    mov edi, EVERY
    call choose_region
    mov rdi, [r15 + RG_PAGES]
    call random_below
    shl rax, 12
    add rax, [r15 + RG_GPA]
    mov r12, rax
    mov r13d, 1
    call check_pages
    dec ebx
    jnz .other
.end:
    pop r15
    pop r13
    pop r12
    pop rbp
    ret

; Every page of every region.
check_all:
    mov r15d, regions
.region:
    mov r12, [r15 + RG_GPA]
    mov r13, [r15 + RG_PAGES]
    test r13, r13
    jz .next
    call check_pages
.next:
    add r15, RG_SIZE
    cmp r15, regions + NR_REGIONS * RG_SIZE
    jb .region
    ret

; rax = a number below rdi.                 changes rdx
random_below:
    call rng_next
    xor edx, edx
    div rdi
    mov rax, rdx
    ret

; r15 = a region of one of the kinds in rdi, or 0.    changes rax, rcx, rdx
choose_region:
    push rdi
    mov edi, NR_REGIONS
    call random_below
    pop rdi
    mov ecx, NR_REGIONS
.try:
    imul r15, rax, RG_SIZE
    add r15, regions
    cmp qword ptr [r15 + RG_PAGES], 0
    je .not
    test [r15 + RG_KIND], rdi
    jnz .end
.not:
    inc rax
    cmp rax, NR_REGIONS
    jb .again
    xor eax, eax
.again:
    dec ecx
    jnz .try
    xor r15d, r15d
.end:
    ret

; Chooses rbp, r15, r12 and r13.            changes rax, rcx, rdx, rdi
choose:
    mov rax, [only]
    cmp rax, NR_OPERATIONS
    jb .chosen
    mov edi, NR_OPERATIONS
    call random_below
.chosen:
    imul rax, rax, OP_SIZE
    lea rbp, [rax + operations]
    mov rdi, [rbp + OP_KINDS]
    call choose_region
    test r15, r15
    jz .end
    mov rdi, [rbp + OP_PAGES]
    call random_below
    lea r13, [rax + 1]
    mov rdi, [r15 + RG_PAGES]
    cmp r13, rdi
    jbe .fits
    mov r13, rdi
.fits:
    sub rdi, r13
    inc rdi
    call random_below
    shl rax, 12
    add rax, [r15 + RG_GPA]
    mov r12, rax
.end:
    ret

; Writes the piece anew, every second time, or reads it.
use_pages:
    call rng_next
    test al, 1
    jz check_pages
; Writes the r13 pages at r12 with a new pattern each.    changes rax, rdx, rsi, rdi
write_pages:
    push r12
    push r13
.page:
    call seed_of
    call rng_next
    or rax, 1
    mov [rdi], rax
    mov rsi, rax
    mov rdi, r12
    mov edx, 512
    call fill_words
    add r12, PAGE_SIZE
    dec r13
    jnz .page
    pop r13
    pop r12
    ret

; rdi = the address of page r12's seed.     keeps all others
seed_of:
    mov rdi, r12
    sub rdi, [r15 + RG_GPA]
    shr rdi, 9
    add rdi, [r15 + RG_SEEDS]
    ret

; The r13 pages at r12 are zeros now.       changes rdi, rcx, rax
forget_pages:
    call seed_of
    mov rcx, r13
    xor eax, eax
    rep stosq
    ret

; Reads every byte of the r13 pages at r12.    changes rax, rcx, rdx, rsi, rdi
check_pages:
    push r12
    push r13
.page:
    call seed_of
    mov rsi, [rdi]
    mov rdi, r12
    test rsi, rsi
    jz .zeros
    mov edx, 512
    call check_words
    jmp .judge
.zeros:
    mov ecx, 512
    xor eax, eax
    repe scasq
    setne al
    test al, al
    jz .good
    lea rcx, [rdi - 8]
    mov [mismatch_at], rcx
    mov rcx, [rcx]
    mov [mismatch_got], rcx
    mov qword ptr [mismatch_want], 0
.judge:
    test rax, rax
    jz .good
    call bad_page
.good:
    add r12, PAGE_SIZE
    dec r13
    jnz .page
    pop r13
    pop r12
    ret

; Says where the first bad word is, and after what.    changes rax
bad_page:
    add [bad_words], rax
    cmp qword ptr [told], 0
    jne .end
    inc qword ptr [told]
    PRINT "wrong after "
    push rdi
    mov rdi, [last_name]
    call print
    pop rdi
    PRINT ": at "
    PRINT_HEX qword ptr [mismatch_at]
    PRINT " got "
    PRINT_HEX qword ptr [mismatch_got]
    PRINT " want "
    PRINT_HEX qword ptr [mismatch_want]
    PRINT "\n"
.end:
    ret

; Counts an answer: served, refused because the host was busy or short, or wrong.    keeps all
count_answer:
    push rcx
    push rdx
    mov rdx, [rbp + OP_NAME]
    mov [last_name], rdx
    lea rdx, [rbp - operations]
    lea rcx, [rdx + served]
    test rax, rax
    jns .count
    lea rcx, [rdx + refused]
    cmp rax, -EBUSY
    je .count
    cmp rax, -ENOMEM
    je .count
    cmp rax, -EAGAIN
    je .count
    cmp rax, -ENOSYS
    je .count
    cmp rax, -EIO                        ; soft_offline: it stays where it is
    je .count
    cmp rax, -EEXIST                     ; lru_gen: that generation is there
    je .count
    lea rcx, [rdx + wrong]
    mov [rdx + answers], rax
.count:
    inc qword ptr [rcx]
    pop rdx
    pop rcx
    ret

; A line for each operation.
report:
    mov ebp, operations
.next:
    lea rbx, [rbp - operations]
    mov rax, [rbx + served]
    add rax, [rbx + refused]
    add rax, [rbx + wrong]
    jz .skip
    mov rdi, [rbp + OP_NAME]
    cmp qword ptr [rbx + wrong], 0
    je .right
    call test_fail_begin
    PRINT "errno "
    mov rax, [rbx + answers]
    neg rax
    PRINT_DEC rax
    PRINT "\n"
    jmp .skip
.right:
    call test_pass
    PRINT "  served "
    PRINT_DEC qword ptr [rbx + served]
    PRINT ", refused "
    PRINT_DEC qword ptr [rbx + refused]
    PRINT "\n"
.skip:
    add rbp, OP_SIZE
    cmp rbp, operations_end
    jb .next
    ret

; -- how operations are asked for: rdi = gpa, rsi = pages, rbp = the entry; rax = the answer ----------
plain:
    HOST0 dword ptr [rbp + OP_NR]
    ret

range:
    HOST2 dword ptr [rbp + OP_NR], rdi, rsi
    ret

ask_protect:
    call rng_next
    and eax, PROT_READ                   ; none, or reading
    HOST3 VMCALL_PROTECT, rdi, rsi, rax
    mov r8, [rdi]                        ; is refused and lifts it, or the store does
    mov [rdi], r8
    ret

one_argument:                            ; for what wants a gpa and no pages
    HOST1 dword ptr [rbp + OP_NR], rdi
    ret

count:                                   ; for what wants a number of pages
    HOST1 dword ptr [rbp + OP_NR], rsi
    ret

switch:                                  ; on or off
    call rng_next
    and eax, 1
    HOST1 dword ptr [rbp + OP_NR], rax
    ret

ask_fork:
    HOST0 VMCALL_FORK
    cmp rax, -EBUSY
    jne .end
    HOST0 VMCALL_CHILD_EXIT
    cmp rax, -ECHILD
    jne .end
    xor eax, eax                         ; the weather was first
.end:
    ret

reads:
    HOST2 dword ptr [rbp + OP_NR], rdi, 4
; The answer must be the word at rdi.
same_word:
    test rax, rax
    js .end
    cmp [rdi], eax
    je .end
    inc qword ptr [bad_others]
.end:
    ret

stores:
    call rng_next
    mov r8, rax
    HOST3 dword ptr [rbp + OP_NR], rdi, r8, 8
    jmp stored_word

ask_dma:
    call rng_next
    mov r8, rax
    HOST4 VMCALL_DMA_WRITE, rdi, r8, 8, 20000
    jmp stored_word

ask_map:
    HOST0 VMCALL_CHILD_EXIT              ; a plain reference does not keep a page from being copied away
    call rng_next
    mov r8, rax
    HOST4 VMCALL_KVM_MAP_WRITE, rdi, r8, 8, 20000
; Somebody else stored r8 at rdi.
stored_word:
    test rax, rax
    js .end
    cmp [rdi], r8
    je .end
    inc qword ptr [bad_others]
.end:
    ret

; An RDMA engine gets the piece, on demand or pinned; its peer reads, stores and adds.
ask_rdma:
    call rng_next
    and eax, 1
    HOST3 VMCALL_RDMA_REGISTER, rdi, rsi, rax
    test rax, rax
    js .end
    mov [key], rax
    HOST3 VMCALL_RDMA_PEER_READ, qword ptr [key], rdi, 4
    call same_word
    call rng_next
    mov r8, rax
    HOST4 VMCALL_RDMA_PEER_WRITE, qword ptr [key], rdi, r8, 8
    call stored_word
    mov r8, [rdi]
    HOST3 VMCALL_RDMA_PEER_ADD, qword ptr [key], rdi, 1
    call added_one
    HOST1 VMCALL_RDMA_DEREGISTER, qword ptr [key]
.end:
    ret

; A device reads and stores, first in RAM, then in its own memory, where the piece goes; what it adds to
; comes back before that.
ask_device:
    HOST2 VMCALL_DEVICE_READ, rdi, 4
    call same_word
    test rax, rax
    js .end
    call rng_next
    mov r8, rax
    HOST3 VMCALL_DEVICE_WRITE, rdi, r8, 8
    call stored_word
    HOST2 VMCALL_DEVICE_MIGRATE, rdi, rsi
    test rax, rax
    js .end
    HOST2 VMCALL_DEVICE_READ, rdi, 4
    call same_word
    HOST2 VMCALL_DEVICE_MIGRATE, rdi, rsi
    call rng_next
    mov r8, rax
    HOST3 VMCALL_DEVICE_WRITE, rdi, r8, 8
    call stored_word
    mov r8, [rdi]
    HOST2 VMCALL_DEVICE_ADD, rdi, 1
    cmp rax, -EOPNOTSUPP
    jne .added
    HOST_KERNEL                          ; make_device_exclusive came with 5.14
    cmp eax, 5 << 16 | 14 << 8
    mov rax, -EOPNOTSUPP
    jae .end
    xor eax, eax
    ret
.added:
    call added_one
.end:
    ret

; Somebody else added 1 to r8 at rdi and answered r8, unless that is an errno; rax = 0, or the errno.
added_one:
    cmp rax, r8
    je .same
    cmp rax, -4096
    ja .end
    inc qword ptr [bad_others]
.same:
    inc r8
    xor eax, eax
    cmp [rdi], r8
    je .end
    inc qword ptr [bad_others]
.end:
    ret

; A function's memory has what was stored, and zeros after its reset.
ask_bar:
    mov rax, [bar_slot]
    test rax, rax
    js .end
    mov rdx, [bar_gpa]
    mov [rdx], rdi
    cmp [rdx], rdi
    jne .bad
    HOST1 VMCALL_PFNMAP_REVOKE, qword ptr [bar_slot]
    cmp qword ptr [rdx], 0
    je .end
.bad:
    inc qword ptr [bad_slot]
.end:
    ret

; The log is turned on, a page written, the log fetched and turned off.
ask_log:
    HOST2 VMCALL_DIRTY_LOG, rdi, 1
    test rax, rax
    js .end
    HOST3 VMCALL_GET_DIRTY, rdi, rsi, 0
    mov rax, [rdi]
    mov [rdi], rax
    HOST3 VMCALL_GET_DIRTY, rdi, rsi, 0
    cmp rax, 1
    jge .off
    inc qword ptr [bad_others]
.off:
    HOST2 VMCALL_DIRTY_LOG, rdi, 0
.end:
    ret

; The slot goes, comes back and moves; its first word says where it was made.
ask_slot:
    mov rax, [slot]
    test rax, rax
    js .end
    HOST1 VMCALL_SLOT_DELETE, qword ptr [slot]
    mov rdx, [slot_at]
    cmp qword ptr [rdx], -1
    jne .bad
    HOST1 VMCALL_SLOT_RESTORE, qword ptr [slot]
    mov rcx, [slot_gpa]
    cmp [rdx], rcx
    jne .bad
    xor rdx, 0x100000
    mov [slot_at], rdx
    HOST2 VMCALL_SLOT_MOVE, qword ptr [slot], rdx
.look:
    mov rdx, [slot_at]
    mov rcx, [slot_gpa]
    cmp [rdx], rcx
    je .end
.bad:
    inc qword ptr [bad_slot]
.end:
    ret

ask_slot_range:
    HOST2 dword ptr [rbp + OP_NR], qword ptr [slot_at], SLOT_PAGES
    ret

ask_ksm_merge:
    and edx, 1
    HOST3 VMCALL_KSM_MERGE, rdi, rsi, rdx
    ret

; Equal pages, so that there is something to merge.
ask_ksm_equal:
    push r12
    push r13
    call rng_next
    or rax, 1
    mov r8, rax
.page:
    call seed_of
    mov [rdi], r8
    mov rsi, r8
    mov rdi, r12
    mov edx, 512
    call fill_words
    add r12, PAGE_SIZE
    dec r13
    jnz .page
    pop r13
    pop r12
    HOST3 VMCALL_KSM_MERGE, r12, r13, 0
    ret

ask_lock:
    HOST2 VMCALL_MLOCK, rdi, rsi
    test rax, rax
    js .end
    HOST2 VMCALL_MUNLOCK, rdi, rsi
.end:
    ret

ask_clear_refs:
    call rng_next
    and eax, 3
    lea rax, [rax + 1]                   ; 1 to 4
    HOST1 VMCALL_CLEAR_REFS, rax
    ret

; What is idle, and then used, is not.
ask_idle:
    HOST2 VMCALL_PAGE_IDLE_SET, rdi, rsi
    test rax, rax
    js .end
    mov rcx, [rdi]
    HOST2 VMCALL_PAGE_IDLE_GET, rdi, rsi
.end:
    ret

ask_mbind:
    call rng_next
    and eax, 1
    HOST3 VMCALL_MBIND, rdi, rsi, rax
    ret

; A device takes the frames, the memory goes out of use; both come back.
ask_contig:
    call write_pages                     ; so that the page has a frame of its own
    HOST2 VMCALL_MIGRATE, r12, 1         ; and is on its list
    mov rax, [r12]
    HOST2 VMCALL_CONTIG_ALLOC, r12, 4
    test rax, rax
    js .end
    HOST1 VMCALL_CONTIG_FREE, rax
.end:
    ret

ask_offline:
    call write_pages
    HOST2 VMCALL_MIGRATE, r12, 1
    mov rax, [r12]
    HOST1 VMCALL_OFFLINE, r12
    test rax, rax
    js .end
    HOST1 VMCALL_ONLINE, rax
.end:
    ret

; Pinned pages stay through what would move them.
ask_pin:
    HOST2 VMCALL_PIN, rdi, rsi
    test rax, rax
    js .end
    HOST2 VMCALL_MIGRATE, rdi, rsi
    HOST2 VMCALL_SWAP_OUT, rdi, rsi
    mov rcx, [rdi]
    HOST2 VMCALL_UNPIN, rdi, rsi
.end:
    ret

; A page of one's own fails.
ask_failure:
    call write_pages
    HOST2 VMCALL_MEMORY_FAILURE, r12, 1
    ret

ask_damon:
    HOST4 VMCALL_DAMON, rdi, rsi, 400000, 50000
    ret

; The vCPU's thread moves to a node, and the next scan of the piece tells where it is used.
ask_numa:
    call rng_next
    and eax, 1
    mov r8, rax
    HOST2 VMCALL_VCPU_NODE, 0, r8
    HOST2 VMCALL_NUMA_BALANCE, rdi, rsi
    test rax, rax
    js .end
    mov rcx, [rdi]
    HOST3 VMCALL_PAGES_ON_NODE, rdi, rsi, r8
.end:
    ret

ask_scan:
    call rng_next
    and eax, 1
    HOST3 VMCALL_PAGEMAP_SCAN, rdi, rsi, rax
    ret

; A snapshot keeps what the first page held when it was taken.
ask_uffd_wp:
    HOST2 VMCALL_UFFD_WP, rdi, rsi
    test rax, rax
    js .end
    mov r8d, [rdi]
    inc dword ptr [rdi]
    HOST2 VMCALL_UFFD_READ, rdi, 4
    test rax, rax
    js .end
    cmp eax, r8d
    je .end
    inc qword ptr [bad_others]
.end:
    ret

ask_uffd_end:
    HOST0 VMCALL_UFFD_END
    cmp rax, -ENOENT
    jne .end
    xor eax, eax                         ; none was open
.end:
    ret

; The rest of the file is cut off and grown again: zeros up to the end.
ask_truncate:
    HOST1 VMCALL_TRUNCATE, rdi
    mov r13, [r15 + RG_GPA]
    mov rcx, [r15 + RG_PAGES]
    shl rcx, 12
    add r13, rcx
    sub r13, r12
    shr r13, 12
    ret

ask_memcg_limit:
    call rng_next
    and eax, 1
    jz .lift
    mov eax, 900
.lift:
    HOST1 VMCALL_MEMCG_LIMIT, rax
    ret

; There is a group once it had a limit.
ask_memcg_reclaim:
    HOST1 VMCALL_MEMCG_RECLAIM, rsi
    cmp rax, -ENOENT
    jne .end
    HOST1 VMCALL_MEMCG_LIMIT, 900
    HOST1 VMCALL_MEMCG_RECLAIM, rsi
.end:
    ret

; Memory that huge pages fit.
ask_huge:
    and r12, -PAGE_2M
    mov r13d, 512
    HOST2 dword ptr [rbp + OP_NR], r12, r13
    ret

; In one piece again, whatever advice and policies its parts got. What cannot be collapsed as it is now is
; EINVAL, too.
ask_collapse:
    and r12, -PAGE_2M
    HOST2 VMCALL_UFFD_MISSING, r12, 1    ; ends what pagemap_scan has registered
    HOST0 VMCALL_UFFD_END
    HOST2 VMCALL_KSM_UNMERGE, r12, 512
    HOST2 VMCALL_THP_ENABLE, r12, 512
    HOST3 VMCALL_MBIND, r12, 512, 0
    call ask_huge
    cmp rax, -EINVAL
    jne .end
    mov rax, -EBUSY
.end:
    ret

; A whole huge page at a time, as hugetlbfs wants it.
ask_huge_punch:
    and r12, -PAGE_2M
    mov r13d, 512
    HOST2 VMCALL_PUNCH_HOLE, r12, r13
    ret

ask_nr_hugepages:
    call rng_next
    and eax, 1
    lea rax, [rax + HUGE_PAGES / 512]
    HOST1 VMCALL_NR_HUGEPAGES, rax
    ret

.section rodata
.align 8
gpas:           .quad MEMFD_GPA, FILE_GPA, PRIVATE_GPA, HUGE_GPA
slot_gpa:       .quad SLOT_TEST_GPA
bar_gpa:        .quad SLOT_TEST_GPA + 0x800000
operations:
    OPERATION name_0, range, VMCALL_SWAP_OUT, 16, SAME, SMALL
    OPERATION name_1, range, VMCALL_MIGRATE, 16, SAME, EVERY
    OPERATION name_2, ask_mbind, 0, 16, SAME, SMALL
    OPERATION name_3, plain, VMCALL_COMPACT, 1, SAME, EVERY
    OPERATION name_4, ask_contig, 0, 1, SAME, ANON
    OPERATION name_5, ask_offline, 0, 1, SAME, ANON
    OPERATION name_6, ask_pin, 0, 16, SAME, PINNABLE
    OPERATION name_7, range, VMCALL_SOFT_OFFLINE, 1, SAME, SMALL
    OPERATION name_8, ask_failure, 0, 1, ZEROS, ANON
    OPERATION name_9, range, VMCALL_DONTNEED, 16, ZEROS, ANON | PRIVATE
    OPERATION name_10, range, VMCALL_DONTNEED, 16, SAME, FILES
    OPERATION name_11, range, VMCALL_FREE, 16, ANYTHING, ANON
    OPERATION name_12, range, VMCALL_COLD, 16, SAME, SMALL
    OPERATION name_13, range, VMCALL_AGE, 16, SAME, EVERY
    OPERATION name_14, ask_idle, 0, 16, SAME, SMALL
    OPERATION name_15, ask_damon, 0, 64, SAME, SMALL
    OPERATION name_16, count, VMCALL_RECLAIM, 32, SAME, EVERY
    OPERATION name_17, ask_protect, 0, 16, SAME, SMALL
    OPERATION name_18, range, VMCALL_MREMAP, 16, SAME, SMALL
    OPERATION name_19, ask_lock, 0, 16, SAME, SMALL
    OPERATION name_20, ask_clear_refs, 0, 1, SAME, EVERY
    OPERATION name_21, ask_scan, 0, 32, SAME, SMALL
    OPERATION name_22, ask_numa, 0, 32, SAME, SMALL
    OPERATION name_23, ask_fork, 0, 8, SAME, EVERY
    OPERATION name_24, reads, VMCALL_HOST_READ, 1, SAME, EVERY
    OPERATION name_25, stores, VMCALL_HOST_WRITE, 1, ANYTHING, EVERY
    OPERATION name_26, reads, VMCALL_MIRROR_READ, 1, SAME, ANON
    OPERATION name_27, ask_dma, 0, 1, ANYTHING, SMALL
    OPERATION name_28, ask_map, 0, 1, ANYTHING, ANON
    OPERATION name_29, reads, VMCALL_DUNE_READ, 1, SAME, SMALL
    OPERATION name_30, stores, VMCALL_DUNE_WRITE, 1, ANYTHING, SMALL
    OPERATION name_31, reads, VMCALL_SVA_READ, 1, SAME, SMALL
    OPERATION name_32, stores, VMCALL_SVA_WRITE, 1, ANYTHING, SMALL
    OPERATION name_33, ask_rdma, 0, 16, ANYTHING, PINNABLE
    OPERATION name_34, ask_device, 0, 16, ANYTHING, ANON
    OPERATION name_35, ask_bar, 0, 1, SAME, ANON
    OPERATION name_36, ask_log, 0, 4, SAME, SMALL
    OPERATION name_37, ask_slot, 0, 2, SAME, ANON
    OPERATION name_38, ask_slot_range, VMCALL_MIGRATE, 2, SAME, ANON
    OPERATION name_39, ask_ksm_merge, 0, 32, SAME, SMALL
    OPERATION name_40, ask_ksm_equal, 0, 8, SAME, SMALL
    OPERATION name_41, range, VMCALL_KSM_UNMERGE, 64, SAME, SMALL
    OPERATION name_42, ask_huge, VMCALL_THP_ENABLE, 1, SAME, ANON
    OPERATION name_43, ask_collapse, VMCALL_COLLAPSE, 1, SAME, ANON
    OPERATION name_44, ask_huge, VMCALL_THP_SPLIT, 1, SAME, ANON
    OPERATION name_45, plain, VMCALL_KHUGEPAGED, 1, SAME, EVERY
    OPERATION name_46, range, VMCALL_UFFD_MISSING, 16, SAME, ANON
    OPERATION name_47, range, VMCALL_UFFD_MOVE, 16, SAME, ANON
    OPERATION name_48, ask_uffd_wp, 0, 16, ANYTHING, ANON
    OPERATION name_49, range, VMCALL_UFFD_MINOR, 16, SAME, SHMEM
    OPERATION name_50, ask_uffd_end, 0, 1, SAME, ANON
    OPERATION name_51, stores, VMCALL_FILE_WRITE, 1, ANYTHING, FILES
    OPERATION name_52, stores, VMCALL_PEER_WRITE, 1, ANYTHING, FILES
    OPERATION name_53, one_argument, VMCALL_FSYNC, 1, SAME, FILES | PRIVATE
    OPERATION name_54, range, VMCALL_FADVISE_DONTNEED, 16, SAME, FILES | PRIVATE
    OPERATION name_55, range, VMCALL_PUNCH_HOLE, 16, ZEROS, FILES
    OPERATION name_56, range, VMCALL_PUNCH_HOLE, 16, SAME, PRIVATE
    OPERATION name_57, range, VMCALL_REMOVE, 16, ZEROS, FILES
    OPERATION name_58, ask_truncate, 0, 1, ZEROS, FILES | PRIVATE
    OPERATION name_59, ask_huge_punch, 0, 1, ZEROS, HUGE
    OPERATION name_60, reads, VMCALL_HUGETLB_PEER_READ, 1, SAME, HUGE
    OPERATION name_61, stores, VMCALL_HUGETLB_PEER_WRITE, 1, ANYTHING, HUGE
    OPERATION name_62, one_argument, VMCALL_HUGETLB_SHARERS, 1, SAME, HUGE
    OPERATION name_63, one_argument, VMCALL_HUGETLB_UNSHARE, 1, SAME, HUGE
    OPERATION name_64, ask_nr_hugepages, 0, 1, SAME, EVERY
    OPERATION name_65, switch, VMCALL_LRU_GEN_ENABLE, 1, SAME, EVERY
    OPERATION name_66, plain, VMCALL_LRU_GEN_AGE, 1, SAME, EVERY
    OPERATION name_67, count, VMCALL_LRU_GEN_EVICT, 32, SAME, EVERY
    OPERATION name_68, ask_memcg_limit, 0, 1, SAME, EVERY
    OPERATION name_69, ask_memcg_reclaim, 0, 32, SAME, EVERY
    OPERATION name_70, switch, VMCALL_ZSWAP_ENABLE, 1, SAME, EVERY
    OPERATION name_71, count, VMCALL_ZSWAP_WRITEBACK, 32, SAME, EVERY
    OPERATION name_72, count, VMCALL_OOM_KILL, 64, SAME, EVERY
operations_end:
.equ NR_OPERATIONS, (operations_end - operations) / OP_SIZE

name_0:         .asciz "swap_out"
name_1:         .asciz "migrate"
name_2:         .asciz "mbind"
name_3:         .asciz "compact"
name_4:         .asciz "contig_alloc, contig_free"
name_5:         .asciz "offline, online"
name_6:         .asciz "pin, unpin"
name_7:         .asciz "soft_offline"
name_8:         .asciz "memory_failure"
name_9:         .asciz "dontneed"
name_10:        .asciz "dontneed of a shared file"
name_11:        .asciz "free"
name_12:        .asciz "cold"
name_13:        .asciz "age"
name_14:        .asciz "page_idle_set, page_idle_get"
name_15:        .asciz "damon"
name_16:        .asciz "reclaim"
name_17:        .asciz "protect"
name_18:        .asciz "mremap"
name_19:        .asciz "mlock, munlock"
name_20:        .asciz "clear_refs"
name_21:        .asciz "pagemap_scan"
name_22:        .asciz "numa_balance, vcpu_node, pages_on_node"
name_23:        .asciz "fork, child_exit"
name_24:        .asciz "host_read"
name_25:        .asciz "host_write"
name_26:        .asciz "mirror_read"
name_27:        .asciz "dma_write"
name_28:        .asciz "kvm_map_write"
name_29:        .asciz "dune_read"
name_30:        .asciz "dune_write"
name_31:        .asciz "sva_read"
name_32:        .asciz "sva_write"
name_33:        .asciz "rdma_register, rdma_peer_*, rdma_deregister"
name_34:        .asciz "device_migrate, device_read, device_write, device_add"
name_35:        .asciz "pfnmap_revoke"
name_36:        .asciz "dirty_log, get_dirty"
name_37:        .asciz "slot_delete, slot_restore, slot_move"
name_38:        .asciz "migrate of a slot"
name_39:        .asciz "ksm_merge"
name_40:        .asciz "ksm_merge of equal pages"
name_41:        .asciz "ksm_unmerge"
name_42:        .asciz "thp_enable"
name_43:        .asciz "collapse"
name_44:        .asciz "thp_split"
name_45:        .asciz "khugepaged"
name_46:        .asciz "uffd_missing"
name_47:        .asciz "uffd_move"
name_48:        .asciz "uffd_wp, uffd_read"
name_49:        .asciz "uffd_minor"
name_50:        .asciz "uffd_end"
name_51:        .asciz "file_write"
name_52:        .asciz "peer_write"
name_53:        .asciz "fsync"
name_54:        .asciz "fadvise_dontneed"
name_55:        .asciz "punch_hole"
name_56:        .asciz "punch_hole under private pages"
name_57:        .asciz "remove"
name_58:        .asciz "truncate"
name_59:        .asciz "punch_hole of huge pages"
name_60:        .asciz "hugetlb_peer_read"
name_61:        .asciz "hugetlb_peer_write"
name_62:        .asciz "hugetlb_sharers"
name_63:        .asciz "hugetlb_unshare"
name_64:        .asciz "nr_hugepages"
name_65:        .asciz "lru_gen_enable"
name_66:        .asciz "lru_gen_age"
name_67:        .asciz "lru_gen_evict"
name_68:        .asciz "memcg_limit"
name_69:        .asciz "memcg_reclaim"
name_70:        .asciz "zswap_enable"
name_71:        .asciz "zswap_writeback"
name_72:        .asciz "oom_kill"

.section bss
.align 8
nr_pages:       .skip 8
only:           .skip 8
kinds:          .skip 8
regions:        .skip RG_SIZE * NR_REGIONS
slot:           .skip 8
slot_at:        .skip 8
bar_slot:       .skip 8
key:            .skip 8
told:           .skip 8
last_name:      .skip 8
bad_words:      .skip 8
bad_others:     .skip 8
bad_slot:       .skip 8
served:         .skip 4096
refused:        .skip 4096
wrong:          .skip 4096
answers:        .skip 4096
