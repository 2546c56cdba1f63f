; shadow-pt: a guest that edits its page tables all the time finds each edit in force when the manual says so
;
; What a hypervisor that shadows page tables could get wrong: entries that come without INVLPG, change and go with
; it; entries written by all kinds of instructions, from aside and through the table's own mapping; tables that
; become data and tables again; address spaces switched by CR3 while one edits another's; supervisor writes
; with CR0.WP clear; U/S and XD changes; 2M pages that the host splits; other CPUs that must be told.
;
; param pages=64    entries of each pass, at most 256
; param rounds=2    passes
; param spaces=6    address spaces, at most 16
; vmcalls: cpu_count start_cpu swap_out migrate
.include "runtime.inc"
.include "cpus.inc"

.equ EDIT_VA, TEST_VA + 0x100000000      ; one page table of its own, and the next one behind it
.equ SPACE_VA, TEST_VA + 0x8000000000    ; of each address space its own
.equ BIG_VA, TEST_VA + 0x140000000
.equ MAX_SPACES, 16
.equ KEY, 0x5EED0000

.include "shadow-pt-writers.inc"
.include "shadow-pt-spaces.inc"

main:
    PARAM rax, "pages", 64
    AT_LEAST rax, 4
    cmp rax, 256
    jbe .pages
    mov eax, 256
.pages:
    mov [pages], rax
    PARAM rax, "rounds", 2
    AT_LEAST rax, 1
    mov [rounds], rax
    call make_tables
    call make_frames
    mov r15, [rounds]
.round:
    call entries_come
    call entries_change
    call rights_grow
    call entries_go
    dec r15
    jnz .round
    call every_writer
    call own_mapping
    call table_and_data
    call address_spaces
    call write_protect_off
    call privilege
    call large_page
    call other_cpus
    ret

; Two page tables side by side in memory, for 4M from EDIT_VA on: `table`.
make_tables:
    mov edi, 2
    call pages_alloc
    mov [table], rax
    mov rdi, rax
    xor eax, eax
    mov ecx, 1024
    rep stosq
    mov rdi, EDIT_VA
    mov esi, 2
    mov edx, pml4
    call walk_create
    mov [directory], rax
    mov rcx, [table]
    add rcx, PTE_P + PTE_W + PTE_U
    mov [rax], rcx
    add rcx, PAGE_SIZE
    mov [rax + 8], rcx
    jmp flush

; `pages` frames side by side; the first word of each is KEY plus its number.
make_frames:
    mov rdi, [pages]
    call pages_alloc
    mov [frames], rax
    xor ecx, ecx
.frame:
    lea rdx, [rcx + KEY]
    mov [rax], rdx
    add rax, PAGE_SIZE
    inc rcx
    cmp rcx, [pages]
    jb .frame
    ret

flush:
    mov rax, cr3
    mov cr3, rax
    ret

; rax = frame number rcx, taken modulo `pages`.      keeps all others
frame:
    push rcx
    push rdx
    mov rax, rcx
    xor edx, edx
    div qword ptr [pages]
    shl rdx, 12
    mov rax, [frames]
    add rax, rdx
    pop rdx
    pop rcx
    ret

; rdi = the address that entry rcx of the table maps.   keeps all others
address:
    push rax
    mov rdi, rcx
    shl rdi, 12
    mov rax, EDIT_VA
    add rdi, rax
    pop rax
    ret

; An entry whose P goes from 0 to 1 needs no INVLPG.
entries_come:
    xor ebx, ebx
    xor ecx, ecx
.page:
    call frame
    call address
    lea rdx, [rax + PTE_P + PTE_W]
    mov r8, [table]
    mov [r8 + rcx*8], rdx
    mov rdx, [rax]
    cmp [rdi], rdx
    jne .wrong
    mov [rdi + 8], rcx
    cmp [rax + 8], rcx
    je .next
.wrong:
    inc ebx
.next:
    inc rcx
    cmp rcx, [pages]
    jb .page
    CHECK_EQ "an entry that comes needs no INVLPG", rbx, 0
    ret

; Before INVLPG a changed entry may show the old frame or the new, after it the new.
entries_change:
    xor ebx, ebx
    xor ebp, ebp
    xor ecx, ecx
.page:
    call address
    call frame
    mov r9, [rax]
    add rcx, 1
    call frame
    sub rcx, 1
    mov r10, [rax]
    lea rdx, [rax + PTE_P + PTE_W]
    mov r8, [table]
    mov [r8 + rcx*8], rdx
    mov rdx, [rdi]
    cmp rdx, r9
    je .either
    cmp rdx, r10
    je .either
    inc ebx
.either:
    invlpg [rdi]
    cmp [rdi], r10
    je .next
    inc ebp
.next:
    inc rcx
    cmp rcx, [pages]
    jb .page
    CHECK_EQ "before INVLPG the old frame shows or the new", rbx, 0
    CHECK_EQ "after INVLPG the new frame shows", rbp, 0
    ret

; A right that comes needs no INVLPG, but may cost one page fault.
rights_grow:
    xor ebx, ebx
    xor ebp, ebp
    xor ecx, ecx
.page:
    call frame
    call address
    mov r8, [table]
    lea rdx, [rax + PTE_P]
    mov [r8 + rcx*8], rdx
    invlpg [rdi]
    mov rdx, [rdi]
    TRY .refused
    mov [rdi + 16], rcx
.refused:
    ENDTRY
    cmp qword ptr [caught_vector], 14
    je .protected
    inc ebx
.protected:
    or qword ptr [r8 + rcx*8], PTE_W
    TRY .first
    mov [rdi + 16], rcx
.first:
    ENDTRY
    cmp qword ptr [caught_vector], -1
    je .written
    TRY .second
    mov [rdi + 16], rcx
.second:
    ENDTRY
    cmp qword ptr [caught_vector], -1
    je .written
    inc ebp
    jmp .next
.written:
    test byte ptr [r8 + rcx*8], PTE_D
    jz .unlogged
    cmp [rax + 16], rcx
    je .next
.unlogged:
    inc ebp
.next:
    inc rcx
    cmp rcx, [pages]
    jb .page
    CHECK_EQ "a right that goes is gone after INVLPG", rbx, 0
    CHECK_EQ "a right that comes is there by the second try, and D is set", rbp, 0
    ret

; An entry that goes is gone after INVLPG.
entries_go:
    xor ebx, ebx
    xor ecx, ecx
.page:
    call address
    mov r8, [table]
    mov qword ptr [r8 + rcx*8], 0
    invlpg [rdi]
    TRY .after
    mov rdx, [rdi]
.after:
    ENDTRY
    cmp qword ptr [caught_vector], 14
    jne .wrong
    cmp [caught_cr2], rdi
    jne .wrong
    cmp qword ptr [caught_error], 0
    je .next
.wrong:
    inc ebx
.next:
    inc rcx
    cmp rcx, [pages]
    jb .page
    CHECK_EQ "an entry that goes is gone after INVLPG", rbx, 0
    ret

; A page is a table, then data that is written from end to end, then a table again.
table_and_data:
    mov r15, [rounds]
    call page_alloc
    mov r12, rax
    xor ebx, ebx
    xor ebp, ebp
.round:
    mov rdi, r12
    xor ecx, ecx
.entry:
    call frame
    lea rdx, [rax + PTE_P + PTE_W]
    mov [r12 + rcx*8], rdx
    inc rcx
    cmp rcx, [pages]
    jb .entry
    mov rdx, [directory]
    lea rax, [r12 + PTE_P + PTE_W]
    mov [rdx + 16], rax
    call check_linked
    mov rdx, [directory]
    mov qword ptr [rdx + 16], 0
    call flush
    xor ecx, ecx
.data:                                   ; no table any more: what looks like entries is not
    lea rax, [rcx + r15]
    mov [r12 + rcx*8], rax
    inc rcx
    cmp rcx, 512
    jb .data
    xor ecx, ecx
.read:
    lea rax, [rcx + r15]
    cmp [r12 + rcx*8], rax
    je .same
    inc ebp
.same:
    inc rcx
    cmp rcx, 512
    jb .read
    mov rdi, r12
    xor eax, eax
    mov ecx, 512
    rep stosq
    dec r15
    jnz .round
    CHECK_EQ "a page that was data is a table again", rbx, 0
    CHECK_EQ "a page that was a table holds data", rbp, 0
    ret

; Adds to ebx the entries of the table linked at EDIT_VA + 4M that show another frame than their own.
check_linked:
    xor ecx, ecx
.page:
    call frame
    call address
    mov rdx, [rax]
    cmp [rdi + 0x400000], rdx
    je .next
    inc ebx
.next:
    inc rcx
    cmp rcx, [pages]
    jb .page
    ret

.section bss
.align 8
pages:          .skip 8
rounds:         .skip 8
table:          .skip 8
directory:      .skip 8
frames:         .skip 8
