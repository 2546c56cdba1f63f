; everything: whatever the host is asked for, in whatever order, every byte is what the guest stored last
;
; A region of memory has a pattern of its own in each page. The guest chooses one of the operations that
; a host knows and a piece of the region at random, uses the piece, so that KVM maps it, asks for the
; operation, and then reads every byte of the piece and of some other pages. At the end it reads all.
;
; param ops=1000    operations
; param seed=1      of the choices and the patterns
; param pages=1024  the region, which begins at a multiple of 2 MiB
; param only=99     the number of the one operation to ask for; 99 for all of them
; param weather=0   ns between two things the host does by itself, about; 0 for none
; vmcalls: swap_out migrate dontneed age reclaim fork child_exit host_read host_write dirty_log get_dirty protect slot_create slot_delete slot_restore slot_move mirror_read dma_write kvm_map_write ksm_merge ksm_unmerge weather dune_read dune_write sva_read sva_write rdma_register rdma_deregister rdma_peer_read rdma_peer_write rdma_peer_add device_migrate device_read device_write device_add pfnmap_create pfnmap_revoke
.include "runtime.inc"

.equ OTHERS, 4                           ; pages that are looked at beside the piece
.equ SLOT_PAGES, 2

; What an operation leaves in the pages of its piece.
.equ SAME, 0
.equ ZEROS, 1
.equ ANYTHING, 2                         ; old bytes or zeros, until they are written again

; An operation: its name, the routine that asks, the vmcall that `range` and `plain` make, pages of the
; largest piece, what it leaves there.
.macro OPERATION name, ask, nr, pages, leaves
    .quad \name, \ask, \nr, \pages, \leaves
.endm
.equ OP_NAME, 0
.equ OP_ASK, 8
.equ OP_NR, 16
.equ OP_PAGES, 24
.equ OP_LEAVES, 32
.equ OP_SIZE, 40

main:
    PARAM r14, "ops", 1000
    PARAM rax, "seed", 1
    mov [rng_state], rax
    PARAM rax, "pages", 1024
    AT_LEAST rax, 16
    mov [nr_pages], rax
    PARAM rax, "only", 99
    mov [only], rax
    NEED_HOST "a host to ask", .end
    call take_memory
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
    mov r12, [region]
    mov r13, [nr_pages]
    call check_pages
    call report
    CHECK_EQ "every byte is what was stored last", qword ptr [bad_words], 0
    CHECK_EQ "what others read and stored", qword ptr [bad_others], 0
    CHECK_EQ "a slot that comes, goes and moves", qword ptr [bad_slot], 0
.end:
    ret

; The region, zeroed by nobody: untouched memory reads as zeros.
take_memory:
    mov rax, [heap_next]
    add rax, PAGE_2M - 1
    and rax, -PAGE_2M
    mov [heap_next], rax
    mov rdi, [nr_pages]
    call pages_alloc
    mov [region], rax
    mov rdi, [nr_pages]
    add rdi, 511
    shr rdi, 9
    call pages_alloc                     ; a qword a page: the seed of its pattern, 0 where it is zeros
    mov [seeds], rax
    mov rdi, rax
    mov rcx, [nr_pages]
    xor eax, eax
    rep stosq
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

; One operation on one piece: rbp = its entry of the table, r12 = gpa, r13 = pages.
one_operation:
    push rbp
    push r12
    push r13
    call choose
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
    mov rdi, [nr_pages]
    call random_below
    shl rax, 12
    add rax, [region]
    mov r12, rax
    mov r13d, 1
    call check_pages
    dec ebx
    jnz .other
    pop r13
    pop r12
    pop rbp
    ret

; rax = a number below rdi.                 changes rdx
random_below:
    call rng_next
    xor edx, edx
    div rdi
    mov rax, rdx
    ret

; Chooses rbp, r12 and r13.                 changes rax, rcx, rdx, rdi
choose:
    mov rax, [only]
    cmp rax, NR_OPERATIONS
    jb .chosen
    mov edi, NR_OPERATIONS
    call random_below
.chosen:
    imul rax, rax, OP_SIZE
    lea rbp, [rax + operations]
    mov rdi, [rbp + OP_PAGES]
    call random_below
    lea r13, [rax + 1]
    cmp r13, [nr_pages]
    jbe .fits
    mov r13, [nr_pages]
.fits:
    mov rdi, [nr_pages]
    sub rdi, r13
    inc rdi
    call random_below
    shl rax, 12
    add rax, [region]
    mov r12, rax
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
    sub rdi, [region]
    shr rdi, 9
    add rdi, [seeds]
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

ask_reclaim:
    HOST1 VMCALL_RECLAIM, rsi
    ret

ask_fork:
    HOST0 VMCALL_FORK
    cmp rax, -EBUSY
    jne .end
    HOST0 VMCALL_CHILD_EXIT
.end:
    ret

ask_host_read:
    HOST2 VMCALL_HOST_READ, rdi, 4
    jmp same_word

ask_mirror:
    HOST2 VMCALL_MIRROR_READ, rdi, 4
; The answer must be the word at rdi.
same_word:
    test rax, rax
    js .end
    cmp [rdi], eax
    je .end
    inc qword ptr [bad_others]
.end:
    ret

ask_host_write:
    call rng_next
    mov r8, rax
    HOST3 VMCALL_HOST_WRITE, rdi, r8, 8
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

; The VMM on an EPT of its own, and a device on the VMM's page tables, each read and store.
ask_dune:
    HOST2 VMCALL_DUNE_READ, rdi, 4
    call same_word
    call rng_next
    mov r8, rax
    HOST3 VMCALL_DUNE_WRITE, rdi, r8, 8
    jmp stored_word

ask_sva:
    HOST2 VMCALL_SVA_READ, rdi, 4
    call same_word
    call rng_next
    mov r8, rax
    HOST3 VMCALL_SVA_WRITE, rdi, r8, 8
    jmp stored_word

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

; The slot goes and comes back, or moves; its first word says where it was made.
ask_slot:
    mov rax, [slot]
    test rax, rax
    js .end
    test sil, 1
    jz .move
    HOST1 VMCALL_SLOT_DELETE, qword ptr [slot]
    mov rdx, [slot_at]
    cmp qword ptr [rdx], -1
    jne .bad
    HOST1 VMCALL_SLOT_RESTORE, qword ptr [slot]
    jmp .look
.move:
    mov rdx, [slot_at]
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

.section rodata
.align 8
slot_gpa:       .quad SLOT_TEST_GPA
bar_gpa:        .quad SLOT_TEST_GPA + 0x800000
operations:
    OPERATION n_swap_out, range, VMCALL_SWAP_OUT, 16, SAME
    OPERATION n_migrate, range, VMCALL_MIGRATE, 16, SAME
    OPERATION n_dontneed, range, VMCALL_DONTNEED, 16, ZEROS
    OPERATION n_age, range, VMCALL_AGE, 16, SAME
    OPERATION n_reclaim, ask_reclaim, 0, 32, SAME
    OPERATION n_protect, ask_protect, 0, 16, SAME
    OPERATION n_fork, ask_fork, 0, 8, SAME
    OPERATION n_host_read, ask_host_read, 0, 1, SAME
    OPERATION n_host_write, ask_host_write, 0, 1, ANYTHING
    OPERATION n_mirror_read, ask_mirror, 0, 1, SAME
    OPERATION n_dma_write, ask_dma, 0, 1, ANYTHING
    OPERATION n_map_write, ask_map, 0, 1, ANYTHING
    OPERATION n_dirty_log, ask_log, 0, 4, SAME
    OPERATION n_slot, ask_slot, 0, 2, SAME
    OPERATION n_slot_move, ask_slot_range, VMCALL_MIGRATE, 2, SAME
    OPERATION n_ksm_merge, ask_ksm_merge, 0, 32, SAME
    OPERATION n_ksm_equal, ask_ksm_equal, 0, 8, SAME
    OPERATION n_ksm_unmerge, range, VMCALL_KSM_UNMERGE, 64, SAME
    OPERATION n_dune, ask_dune, 0, 1, ANYTHING
    OPERATION n_sva, ask_sva, 0, 1, ANYTHING
    OPERATION n_rdma, ask_rdma, 0, 16, ANYTHING
    OPERATION n_device, ask_device, 0, 16, ANYTHING
    OPERATION n_bar, ask_bar, 0, 1, SAME
operations_end:
.equ NR_OPERATIONS, 23

n_swap_out:     .asciz "swap_out"
n_migrate:      .asciz "migrate"
n_dontneed:     .asciz "dontneed"
n_age:          .asciz "age"
n_reclaim:      .asciz "reclaim"
n_protect:      .asciz "protect"
n_fork:         .asciz "fork, child_exit"
n_host_read:    .asciz "host_read"
n_host_write:   .asciz "host_write"
n_mirror_read:  .asciz "mirror_read"
n_dma_write:    .asciz "dma_write"
n_map_write:    .asciz "kvm_map_write"
n_dirty_log:    .asciz "dirty_log, get_dirty"
n_slot:         .asciz "slot_delete, slot_restore, slot_move"
n_slot_move:    .asciz "migrate of a slot"
n_ksm_merge:    .asciz "ksm_merge"
n_ksm_equal:    .asciz "ksm_merge of equal pages"
n_ksm_unmerge:  .asciz "ksm_unmerge"
n_dune:         .asciz "dune_read, dune_write"
n_sva:          .asciz "sva_read, sva_write"
n_rdma:         .asciz "rdma_register, rdma_peer_*, rdma_deregister"
n_device:       .asciz "device_migrate, device_read, device_write, device_add"
n_bar:          .asciz "pfnmap_revoke"

.section bss
.align 8
nr_pages:       .skip 8
only:           .skip 8
region:         .skip 8
seeds:          .skip 8
slot:           .skip 8
slot_at:        .skip 8
bar_slot:       .skip 8
key:            .skip 8
told:           .skip 8
last_name:      .skip 8
bad_words:      .skip 8
bad_others:     .skip 8
bad_slot:       .skip 8
served:         .skip 8 * 512
refused:        .skip 8 * 512
wrong:          .skip 8 * 512
answers:        .skip 8 * 512
