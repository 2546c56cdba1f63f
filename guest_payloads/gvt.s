; gvt: a GPU whose tables lie in guest memory follows every write to them, however it is made
;
; The table's page is write-tracked: each store exits, KVM emulates it and tells the GPU. Stores of every size,
; locked ones, strings, ones that cross entries and pages; by two GPUs at once; while the host takes the table
; and other CPUs count in it.
;
; param rounds=8    times that the host takes the table away
; param count=200   locked additions of each CPU
; vmcalls: gvt_open gvt_close gvt_shadow gvt_unshadow gvt_stale gvt_told gvt_read swap_out migrate
; vmcalls: slot_create slot_delete dirty_log get_dirty cpu_count start_cpu
.include "runtime.inc"
.include "cpus.inc"

.equ PAGES, 8
.equ COUNTER, 4088                       ; in the table: an entry of its own
.equ PATIENCE, 1 << 28

main:
    PARAM r12, "rounds", 8
    PASS "the guest runs without a GPU"
    NEED_HOST "the GPU", .end
    mov edi, PAGES + 2
    call pages_alloc
    add rax, 4096                        ; a page before the table, for stores that cross into it
    mov r13, rax
    mov rdi, rax
    sub rdi, 4096
    xor eax, eax
    mov ecx, (PAGES + 2) * 512
    rep stosq
    call fill_table
    HOST0 VMCALL_GVT_OPEN
    mov r15, rax
    CHECK_EQ "the first GPU", rax, 1
    HOST2 VMCALL_GVT_SHADOW, r15, r13
    CHECK_EQ "it shadows the table", rax, 0
    HOST2 VMCALL_GVT_SHADOW, r15, r13
    CHECK_EQ "a table that it shadows already", rax, -EEXIST
    call reads
    call stores
    call crossings
    call strings
    call logged
    call taken
    call two
    call beside
    call slot
    HOST2 VMCALL_GVT_UNSHADOW, r15, r13
    CHECK_EQ "the GPU forgets the table", rax, 0
    mov qword ptr [r13], 0
    HOST1 VMCALL_GVT_CLOSE, r15
    CHECK_EQ "the GPU goes", rax, 0
    HOST1 VMCALL_GVT_STALE, r15
    CHECK_EQ "and is gone", rax, -ENOENT
.end:
    ret

; Entry n maps page n behind the table, which begins with n + 0x1000.
fill_table:
    xor ecx, ecx
.entry:
    mov rax, rcx
    inc rax
    shl rax, 12
    add rax, r13
    lea rdx, [rcx + 0x1000]
    mov [rax], rdx
    or rax, 1
    mov [r13 + rcx*8], rax
    inc ecx
    cmp ecx, PAGES
    jb .entry
    ret

reads:
    xor ebx, ebx
    xor ebp, ebp
.next:
    HOST4 VMCALL_GVT_READ, r15, r13, rbp, 0
    sub rax, 0x1000
    sub rax, rbp
    or rbx, rax
    inc ebp
    cmp ebp, PAGES
    jb .next
    CHECK_EQ "what the GPU reads by it", rbx, 0
    HOST4 VMCALL_GVT_READ, r15, r13, PAGES, 0
    CHECK_EQ "an entry that maps nothing", rax, -EFAULT
    ret

; FOLLOWED "name", value: [r13 + 64] is value, and so the GPU sees it
.macro FOLLOWED name, due
    mov rax, [r13 + 64]
    mov rcx, \due
    CHECK_EQ \name, rax, rcx
    HOST1 VMCALL_GVT_STALE, r15
    CHECK_EQ "followed", rax, 0
.endm

stores:
    mov rax, 0x1122334455667788
    mov [r13 + 64], rax
    FOLLOWED "a store of 8 bytes", 0x1122334455667788
    mov dword ptr [r13 + 64], 0x99AABBCC
    FOLLOWED "of 4", 0x1122334499AABBCC
    mov word ptr [r13 + 70], 0x5566
    FOLLOWED "of 2", 0x5566334499AABBCC
    mov byte ptr [r13 + 68], 7
    FOLLOWED "of 1", 0x5566330799AABBCC
    mov eax, 4
    add [r13 + 64], rax
    FOLLOWED "an addition", 0x5566330799AABBD0
    lock sub qword ptr [r13 + 64], 0xD0
    FOLLOWED "a locked subtraction", 0x5566330799AABB00
    mov eax, 3
    xchg rax, [r13 + 64]
    mov rcx, 0x5566330799AABB00
    CHECK_EQ "an exchange gives what was there", rax, rcx
    FOLLOWED "and stores", 3
    mov eax, 3
    mov ecx, 9
    lock cmpxchg [r13 + 64], rcx
    setz al
    movzx eax, al
    CHECK_EQ "a compare that is equal", rax, 1
    FOLLOWED "exchanges", 9
    mov eax, 3
    lock cmpxchg [r13 + 64], rcx
    CHECK_EQ "one that is not gives what was there", rax, 9
    FOLLOWED "and changes nothing", 9
    mov eax, 5
    lock xadd [r13 + 64], rax
    CHECK_EQ "an exchange and add", rax, 9
    FOLLOWED "adds", 14
    neg qword ptr [r13 + 64]
    FOLLOWED "a negation", -14
    not qword ptr [r13 + 64]
    FOLLOWED "a complement", 13
    mov rax, [r13]                       ; page 0's entry gives way to page 1's
    mov rcx, [r13 + 8]
    mov [r13], rcx
    HOST4 VMCALL_GVT_READ, r15, r13, 0, 0
    CHECK_EQ "the GPU goes by the new entry", rax, 0x1001
    call fill_table
    HOST4 VMCALL_GVT_READ, r15, r13, 0, 0
    CHECK_EQ "and by the old one again", rax, 0x1000
    ret

crossings:
    mov rax, 0x0102030405060708
    mov [r13 + 60], rax
    FOLLOWED "a store across two entries", 0x01020304
    mov qword ptr [r13 + 64], 0
    mov rax, 0x1112131415161718
    mov [r13 - 3], rax
    mov ecx, [r13 - 4]
    shr ecx, 8
    CHECK_EQ "a store across pages, before the table", rcx, 0x161718
    mov ecx, [r13]
    CHECK_EQ "and in it", rcx, 0x12131415
    HOST1 VMCALL_GVT_STALE, r15
    CHECK_EQ "the GPU follows its part", rax, 0
    lock add dword ptr [r13 - 2], 0x10000
    mov ecx, [r13]
    CHECK_EQ "a locked one", rcx, 0x12131416
    mov rax, [r13 - 3]
    mov rcx, 0x1112131416161718
    CHECK_EQ "is whole", rax, rcx
    call fill_table
    HOST1 VMCALL_GVT_STALE, r15
    CHECK_EQ "followed", rax, 0
    ret

strings:
    lea rdi, [r13 + 64]
    mov rax, 0x5500
    mov ecx, 16
    rep stosq
    FOLLOWED "rep stosq", 0x5500
    lea rdi, [r13 - 16]
    lea rsi, [r13 + 80]
    mov ecx, 4
    rep movsq
    mov rax, [r13 + 8]
    CHECK_EQ "rep movsq across the table's beginning", rax, 0x5500
    HOST1 VMCALL_GVT_STALE, r15
    CHECK_EQ "followed", rax, 0
    call fill_table
    ret

logged:
    HOST2 VMCALL_DIRTY_LOG, r13, 1
    HOST3 VMCALL_GET_DIRTY, r13, 1, 0
    mov qword ptr [r13 + 64], 1
    HOST3 VMCALL_GET_DIRTY, r13, 1, 0
    CHECK_EQ "an emulated store is in the dirty log", rax, 1
    HOST3 VMCALL_GET_DIRTY, r13, 1, 0
    CHECK_EQ "once", rax, 0
    HOST2 VMCALL_DIRTY_LOG, r13, 0
    mov qword ptr [r13 + 64], 2
    FOLLOWED "the table is tracked after that, too", 2
    ret

; The host takes the table; what the notifier unmaps is mapped again without the right to write.
taken:
    xor ebx, ebx
    mov rbp, r12
    test rbp, rbp
    jz .done
.round:
    test ebp, 1
    jz .out
    HOST2 VMCALL_MIGRATE, r13, 1
    jmp .write
.out:
    HOST2 VMCALL_SWAP_OUT, r13, 1
.write:
    mov [r13 + 72], rbp
    HOST1 VMCALL_GVT_STALE, r15
    or rbx, rax
    mov rax, [r13 + 72]
    xor rax, rbp
    or rbx, rax
    dec rbp
    jnz .round
.done:
    CHECK_EQ "the GPU follows wherever the table is", rbx, 0
    ret

; A second node on the head shadows the same table.
two:
    HOST1 VMCALL_GVT_TOLD, r15
    mov rbp, rax
    HOST0 VMCALL_GVT_OPEN
    mov r14, rax
    HOST2 VMCALL_GVT_SHADOW, r14, r13
    CHECK_EQ "a second GPU shadows it, too", rax, 0
    mov qword ptr [r13 + 64], 77
    HOST1 VMCALL_GVT_TOLD, r14
    CHECK_EQ "the second is told", rax, 1
    HOST1 VMCALL_GVT_TOLD, r15
    sub rax, rbp
    CHECK_EQ "and the first", rax, 1
    HOST1 VMCALL_GVT_STALE, r14
    CHECK_EQ "followed", rax, 0
    HOST1 VMCALL_GVT_CLOSE, r14
    CHECK_EQ "the second goes", rax, 0
    mov qword ptr [r13 + 64], 78
    FOLLOWED "the table stays tracked for the first", 78
    ret

; All CPUs count in the table.
beside:
    HOST0 VMCALL_CPU_COUNT
    mov r14, rax
    mov [table], r13
    PARAM rax, "count", 200
    mov [count], rax
    mov qword ptr [r13 + COUNTER], 0
    call start_cpus
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
    mov rax, [count]
    imul rax, r14
    CHECK_EQ "no addition is lost", qword ptr [r13 + COUNTER], rax
    HOST1 VMCALL_GVT_STALE, r15
    CHECK_EQ "and the GPU saw them all", rax, 0
    ret

work:
    mov rdi, [table]
    mov rcx, [count]
    mov edx, 1
    test rcx, rcx
    jz .counted
.next:
    test ecx, 1
    jz .by_exchange
    lock inc qword ptr [rdi + COUNTER]
    jmp .added
.by_exchange:
    mov rax, [rdi + COUNTER]
.again:
    lea rsi, [rax + 1]
    lock cmpxchg [rdi + COUNTER], rsi
    jne .again
.added:
    dec rcx
    jnz .next
.counted:
    lock inc qword ptr [done]
    ret

; A table in a slot that goes.
slot:
    HOST2 VMCALL_SLOT_CREATE, qword ptr [slot_gpa], 4
    mov r14, rax
    mov rbp, [slot_gpa]
    HOST2 VMCALL_GVT_SHADOW, r15, rbp
    mov qword ptr [rbp], 5
    HOST1 VMCALL_GVT_STALE, r15
    CHECK_EQ "a table in a slot of its own", rax, 0
    HOST1 VMCALL_SLOT_DELETE, r14
    CHECK_EQ "the slot goes", rax, 0
    HOST2 VMCALL_GVT_UNSHADOW, r15, rbp
    CHECK_EQ "and the GPU has let it be", rax, -ENOENT
    mov qword ptr [r13 + 64], 79
    FOLLOWED "the other table is tracked still", 79
    ret

.section rodata
.align 8
slot_gpa:       .quad SLOT_TEST_GPA

.section bss
.align 8
table:          .skip 8
count:          .skip 8
done:           .skip 8
