; migrate: data, code that is running, stack, page tables and descriptor tables move to other frames
;
; Each kind of page is migrated under the guest while it is in use. The running function's own page is
; the hardest: the instruction after the vmcall is fetched from the new frame.
;
; param pages=32    pages of data
; param rounds=2    how often each is moved
; param seed=1      of the data
; vmcalls: migrate
.include "runtime.inc"

main:
    PARAM r12, "pages", 32
    PARAM r14, "rounds", 2
    AT_LEAST r12, 1
    AT_LEAST r14, 1
    PARAM rax, "seed", 1
    mov [seed], rax
    mov rdi, r12
    call pages_alloc
    mov r13, rax
    mov rdi, r13
    mov rsi, [seed]
    mov rdx, r12
    shl rdx, 9
    call fill_words
    mov ebx, r14d
.round:
    call move_data
    call move_code
    call move_stack
    call move_tables
    call move_descriptors
    dec ebx
    jnz .round
    ret

move_data:
    HOST2 VMCALL_MIGRATE, r13, r12
    HOST_CHECK "migrate data", r12
    mov rdi, r13
    mov rsi, [seed]
    mov rdx, r12
    shl rdx, 9
    call check_words
    CHECK_EQ "data after migration", rax, 0
    inc qword ptr [seed]                 ; and the new frame is written
    mov rdi, r13
    mov rsi, [seed]
    mov rdx, r12
    shl rdx, 9
    call fill_words
    call check_words
    CHECK_EQ "data written after migration", rax, 0
    ret

move_code:
    call moving_code
    mov rdi, rdx
    HOST_CHECK "migrate the running code page", 1
    CHECK_EQ "code goes on after its page moved", rdi, 0x1234
    ret

move_stack:
    mov rcx, rsp
    and rcx, -PAGE_SIZE
    mov rdx, 0x5ca1ab1e
    push rdx
    HOST2 VMCALL_MIGRATE, rcx, 1
    pop rdx
    HOST_CHECK "migrate the stack", 1
    CHECK_EQ "the stack after migration", rdx, 0x5ca1ab1e
    ret

move_tables:
    HOST2 VMCALL_MIGRATE, pml4, 7        ; PML4, PDPT, four directories, the first table
    HOST_CHECK "migrate the page tables", 7
    mov rax, cr3
    mov cr3, rax
    mov rax, [r13]
    mov rdi, r13
    mov rsi, [seed]
    mov edx, 512
    call check_words
    CHECK_EQ "a walk through moved tables", rax, 0
    ret

move_descriptors:
    HOST2 VMCALL_MIGRATE, idt, 2         ; IDT, and the TSS behind it
    HOST_CHECK "migrate IDT and TSS", 2
    HOST2 VMCALL_MIGRATE, gdt, 1
    HOST_CHECK "migrate the GDT", 1
    mov eax, KERNEL_DATA
    mov es, ax                           ; reads the GDT
    TRY .trapped
    ud2
.trapped:
    ENDTRY
    CHECK_EQ "an exception through moved tables", qword ptr [caught_vector], 6
    ret

; Moves the page it runs on. rax = the call's result, rdx = 0x1234 computed by code behind it.
.align 4096
moving_code:
    HOST2 VMCALL_MIGRATE, moving_code, 1
    mov edx, 0x1200
    jmp .further
    .skip 1024
.further:
    add edx, 0x34
    ret
.align 4096

.section bss
.align 8
seed:   .skip 8
