; shadow-bugs: what a guest's page tables must look like for the mistakes that shadow paging has made to show
;
; Each is right on hardware: one table by two ways of which one lets write, an entry that goes from memory to
; a device without a flush, a page that is read-only after it was written, and an entry that another CPU
; writes while its table is used for the first time.
;
; param tables=48   page tables that another CPU writes, at most 256
; vmcalls: cpu_count start_cpu swap_out free
.include "runtime.inc"
.include "cpus.inc"

.equ EDIT_VA, TEST_VA + 0x100000000
.equ RACE_VA, TEST_VA + 0x140000000
.equ ALIAS, 16                           ; directory entries between two ways to one table
.equ DEVICE_GPA, 0xD0000000              ; where nobody answers
.equ KEY, 0x5EED0000
.equ PATIENCE, 1 << 20

main:
    PARAM rax, "tables", 48
    AT_LEAST rax, 1
    cmp rax, 256
    jbe .tables
    mov eax, 256
.tables:
    mov [tables], rax
    call make_table
    call two_ways
    call memory_to_device
    call read_only_after_write
    call written_meanwhile
    ret

; A page table at EDIT_VA whose first entries lead to `frames`, of which each holds KEY plus its number.
make_table:
    mov edi, 1
    call zeroed
    mov [table], rax
    mov rdi, EDIT_VA
    mov esi, 2
    mov edx, pml4
    call walk_create
    mov [directory], rax
    mov rcx, [table]
    add rcx, PTE_P + PTE_W + PTE_U
    mov [rax], rcx
    mov edi, 8
    call zeroed
    mov [frames], rax
    mov rdx, [table]
    xor ecx, ecx
.frame:
    lea rdi, [rcx + KEY]
    mov [rax], rdi
    lea rdi, [rax + PTE_P + PTE_W + PTE_U]
    mov [rdx + rcx*8], rdi
    add rax, PAGE_SIZE
    inc ecx
    cmp ecx, 8
    jb .frame
    jmp flush

; rax = rdi pages of zeros.
zeroed:
    push rdi
    call pages_alloc
    pop rcx
    shl rcx, 9
    push rax
    mov rdi, rax
    xor eax, eax
    rep stosq
    pop rax
    ret

flush:
    mov rax, cr3
    mov cr3, rax
    ret

; One table below an entry that lets write and below one that does not.
two_ways:
    mov rdx, [directory]
    mov rax, [table]
    add rax, PTE_P + PTE_U
    mov [rdx + ALIAS*8], rax
    mov rdi, EDIT_VA + 3 * PAGE_SIZE
    mov qword ptr [rdi + 8], 4
    mov rsi, EDIT_VA + ALIAS * PAGE_2M + 3 * PAGE_SIZE
    mov rax, [rsi + 8]
    CHECK_EQ "a table by another way", rax, 4
    TRY .after
    mov qword ptr [rsi + 8], 5
.after:
    ENDTRY
    CHECK_EQ "which does not let write", qword ptr [caught_error], 3
    mov rdx, [directory]
    mov qword ptr [rdx + ALIAS*8], 0
    jmp flush

; An entry goes from a read-only page to a device; the store that follows may go to neither but the device.
memory_to_device:
    mov rdi, EDIT_VA + 4 * PAGE_SIZE
    mov rdx, [table]
    and qword ptr [rdx + 4*8], ~PTE_W
    invlpg [rdi]
    mov rax, [rdi]
    mov rcx, [rdx + 4*8]
    push rcx
    mov rax, DEVICE_GPA + PTE_P + PTE_W + PTE_U + PTE_A + PTE_D
    mov [rdx + 4*8], rax
    mov byte ptr [rdi + 8], 1
    invlpg [rdi]
    pop rcx
    or rcx, PTE_W
    mov [rdx + 4*8], rcx
    mov rax, [rdi + 8]
    invlpg [rdi]
    mov rax, [rdi + 8]
    CHECK_EQ "what was stored to a device is not in memory", rax, 0
    ret

; The guest writes to a page that the host may throw away, makes it read-only, and finds what it wrote.
read_only_after_write:
    mov r12, [frames]
    add r12, 5 * PAGE_SIZE
    mov r13, EDIT_VA + 5 * PAGE_SIZE
    mov qword ptr [r13], 1
    NEED_HOST "reclaim", .end
    HOST2 VMCALL_FREE, r12, 1
    HOST_CHECK "the host may throw it away", 0
    mov rax, [r13 + 16]                  ; it is mapped writable
    mov qword ptr [r13], 2
    mov rdx, [table]
    and qword ptr [rdx + 5*8], ~PTE_W
    call flush
    mov rax, [r13]
    CHECK_EQ "a page that has become read-only", rax, 2
    HOST2 VMCALL_SWAP_OUT, r12, 1
    mov rax, [r13]
    CHECK_EQ "keeps what was written", rax, 2
    mov rdx, [table]
    or qword ptr [rdx + 5*8], PTE_W
.end:
    ret

; Another CPU gives the first entry of each of many tables one frame after the other, while CPU 0 links the
; table and reads by it. CPU 0 flushes before it believes what it reads.
written_meanwhile:
    NEED_HOST "another CPU", .end
    HOST0 VMCALL_CPU_COUNT
    cmp rax, 2
    jb .end
    mov rdi, [tables]
    call zeroed
    mov r12, rax
    mov r13, RACE_VA
    mov rdi, r13
    mov esi, 2
    mov edx, pml4
    call walk_create
    mov rbp, rax
    mov rax, [frames]
    add rax, PTE_P + PTE_W + PTE_U + PTE_A + PTE_D
    mov [first_entry], rax
    mov rdi, r12
    mov rcx, [tables]
.fill:
    mov [rdi], rax
    add rdi, PAGE_SIZE
    dec rcx
    jnz .fill
    mov [current], r12
    mov r14d, 2
    call start_cpus
    xor ebx, ebx
    mov r15, [tables]
.table:
    mov [current], r12
    mov qword ptr [turns], 0
    mov r8d, PATIENCE
.wait:                                   ; it has found the table
    cmp qword ptr [turns], 0
    jne .link
    call let_run
    dec r8d
    jnz .wait
.link:
    lea rax, [r12 + PTE_P + PTE_W + PTE_U]
    mov [rbp], rax
    mov rax, [r13]
    sub rax, KEY
    cmp rax, 4
    jb .known
    inc ebx
.known:
    add rbp, 8
    add r13, PAGE_2M
    add r12, PAGE_SIZE
    dec r15
    jnz .table
    mov qword ptr [current], 0
    mov r8d, PATIENCE
.stop:
    cmp qword ptr [stopped], 0
    jne .stopped
    call let_run
    dec r8d
    jnz .stop
.stopped:
    CHECK_EQ "the other CPU stopped", qword ptr [stopped], 1
    CHECK_EQ "an entry that is written meanwhile shows a frame that it had", rbx, 0
    call flush
    call last_frames
    CHECK_EQ "and after a flush its last", rbx, 0
.end:
    ret

; rbx = tables whose first entry shows another frame than its own.
last_frames:
    xor ebx, ebx
    mov rcx, [tables]
    mov r13, RACE_VA
    mov rdi, r13
    mov esi, 2
    mov edx, pml4
    push rcx
    call walk_create
    pop rcx
    mov rbp, rax
.table:
    mov rdx, [rbp]
    and rdx, -PAGE_SIZE
    mov rdx, [rdx]
    and rdx, -PAGE_SIZE
    mov rax, [rdx]
    cmp [r13], rax
    je .same
    inc ebx
.same:
    add rbp, 8
    add r13, PAGE_2M
    dec rcx
    jnz .table
    ret

; An instruction that exits, so that a machine may let the other CPU run.    changes rax, rcx, rdx
let_run:
    push rbx
    xor eax, eax
    cpuid
    pop rbx
    ret

; The other CPU.
work:
    xor r8d, r8d
.again:
    mov rdi, [current]
    test rdi, rdi
    jz .end
    mov eax, r8d
    and eax, 3
    shl eax, 12
    add rax, [first_entry]
    mov [rdi], rax
    inc qword ptr [turns]
    inc r8d
    call let_run
    jmp .again
.end:
    inc qword ptr [stopped]
    ret

.section bss
.align 8
tables:         .skip 8
table:          .skip 8
directory:      .skip 8
frames:         .skip 8
first_entry:    .skip 8
current:        .skip 8
turns:          .skip 8
stopped:        .skip 8
