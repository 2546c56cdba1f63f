; guest-paging: the guest's own page tables decide as the SDM says: rights, error codes, CR2, A/D bits
;
; First every combination of P, R/W, U/S, XD of a table entry and of the one above it with CR0.WP, SMEP,
; SMAP and EFLAGS.AC, for a read, a write and a fetch of ring 0 and of ring 3: the payload computes what
; must happen and compares error code, A and D. Then single cases: reserved bits, levels, large pages,
; INVLPG, address spaces, page borders. Last a kernel that pages a ring-3 program in on demand.
;
; param pages=32    pages of the ring-3 program
.include "runtime.inc"
.include "guest-paging-cases.inc"
.include "guest-paging-demand.inc"

.equ MATRIX_VA, TEST_VA + 0x40000000
.equ TARGET_OFFSET, 0x123
.equ RET, 0xC3

; A case's number: four bits of the PTE, two of the PDE, four of the control registers.
.equ CASE_P, 1 << 0
.equ CASE_W, 1 << 1
.equ CASE_U, 1 << 2
.equ CASE_NX, 1 << 3
.equ CASE_UP_W, 1 << 4
.equ CASE_UP_U, 1 << 5
.equ CASE_WP, 1 << 6
.equ CASE_SMEP, 1 << 7
.equ CASE_SMAP, 1 << 8
.equ CASE_AC, 1 << 9
.equ CASE_CONTROLS, CASE_WP | CASE_SMEP | CASE_SMAP | CASE_AC
.equ CASES, 1 << 10

; A group's number: the access, and who makes it.
.equ ACCESS_READ, 0
.equ ACCESS_WRITE, 1
.equ ACCESS_FETCH, 2
.equ GROUP_USER, 4

main:
    mov esi, user_text
    call map_user
    mov rdi, MATRIX_VA
    mov esi, 2
    mov edx, pml4
    call walk_create
    mov [matrix_pde], rax
    mov esi, 1
    call walk_create
    mov [matrix_pte], rax
    call page_alloc
    mov [matrix_frame], rax
    mov byte ptr [rax + TARGET_OFFSET], RET
    mov rax, [matrix_pde]
    mov rax, [rax]
    mov rcx, PTE_ADDR
    and rax, rcx
    mov [matrix_table], rax
    xor r12d, r12d
.group:
    call run_group
    mov rdi, [r12*8 + group_names]
    mov rsi, rbx
    xor edx, edx
    call test_eq
    inc r12d
    mov eax, r12d
    and eax, 3
    cmp eax, 3
    jne .next
    inc r12d
.next:
    cmp r12d, 8
    jb .group
    call single_cases
    call demand_paging
    ret

; All cases of group r12d; rbx = how many went wrong.
run_group:
    xor r13d, r13d
    xor ebx, ebx
.case:
    call relevant
    test eax, eax
    jz .next
    call expected
    mov r14, rax
    call set_entries
    call make_access
    call judge
.next:
    inc r13d
    cmp r13d, CASES
    jb .case
    ret

; eax = 1 if case r13d says something about group r12d on this CPU.
relevant:
    mov ecx, r13d
    xor eax, eax
    test ecx, CASE_NX
    jz .nx
    cmp byte ptr [have_nx], 0
    je .no
.nx:
    test ecx, CASE_SMEP
    jz .smep
    cmp byte ptr [have_smep], 0
    je .no
.smep:
    test ecx, CASE_SMAP | CASE_AC
    jz .smap
    cmp byte ptr [have_smap], 0
    je .no
.smap:
    and ecx, CASE_CONTROLS
    cmp ecx, CASE_CONTROLS               ; all together matter to everyone
    je .yes
    mov edx, [r12*4 + group_controls]
    not edx
    test ecx, edx
    jnz .no
.yes:
    mov eax, 1
.no:
    ret

; rax = the #PF error code due to case r13d in group r12d, or -1 for no fault. SDM vol. 3A, 4.6 and 4.7.
expected:
    mov ecx, r13d
    mov r8d, r13d
    shr r8d, 3
    and r8d, r13d                        ; bit 1: W in both entries, bit 2: U in both
    mov edx, r12d
    and edx, 3
    mov eax, 0x10
    cmp edx, ACCESS_FETCH
    je .instruction
    lea eax, [rdx*2]                     ; W/R
    jmp .have_kind
.instruction:
    cmp byte ptr [have_nx], 0
    jne .have_kind
    test ecx, CASE_SMEP
    jnz .have_kind
    xor eax, eax                         ; I/D is only reported with NXE or SMEP
.have_kind:
    test r12d, GROUP_USER
    jz .supervisor_code
    or eax, 4
.supervisor_code:
    test ecx, CASE_P
    jz .fault
    or eax, 1
    cmp edx, ACCESS_FETCH
    jne .rights
    test ecx, CASE_NX
    jnz .fault
.rights:
    test r12d, GROUP_USER
    jz .supervisor
    test r8d, CASE_U
    jz .fault
    cmp edx, ACCESS_WRITE
    jne .allowed
    test r8d, CASE_W
    jz .fault
    jmp .allowed
.supervisor:
    test r8d, CASE_U
    jz .supervisor_page
    cmp edx, ACCESS_FETCH
    je .smep
    test ecx, CASE_SMAP
    jz .supervisor_page
    test ecx, CASE_AC
    jnz .supervisor_page
    jmp .fault
.smep:
    test ecx, CASE_SMEP
    jnz .fault
.supervisor_page:
    cmp edx, ACCESS_WRITE
    jne .allowed
    test ecx, CASE_WP
    jz .allowed
    test r8d, CASE_W
    jz .fault
.allowed:
    mov rax, -1
.fault:
    ret

; The entries of case r13d, with A and D clear.
set_entries:
    mov eax, r13d
    and eax, 7                           ; P, W, U stand where the entry has them
    add rax, [matrix_frame]
    test r13d, CASE_NX
    jz .executable
    or rax, [nx_bit]
.executable:
    mov rcx, [matrix_pte]
    mov [rcx], rax
    mov eax, r13d
    shr eax, 3
    and eax, PTE_W | PTE_U
    or eax, PTE_P
    add rax, [matrix_table]
    mov rcx, [matrix_pde]
    mov [rcx], rax
    mov rdi, MATRIX_VA
    invlpg [rdi]
    ret

; The access of group r12d under the control bits of case r13d. caught_* say what came of it.
make_access:
    mov rcx, cr0
    mov [saved_cr0], rcx
    and ecx, ~CR0_WP
    mov eax, r13d
    and eax, CASE_WP
    shl eax, 10
    or ecx, eax
    mov cr0, rcx
    mov rcx, cr4
    mov [saved_cr4], rcx
    mov eax, r13d
    and eax, CASE_SMEP | CASE_SMAP
    shl eax, 13
    or ecx, eax
    mov cr4, rcx
    mov rdi, MATRIX_VA + TARGET_OFFSET
    TRY .after
    test r12d, GROUP_USER
    jnz .user
    test r13d, CASE_AC
    jz .no_ac
    stac
.no_ac:
    mov eax, r12d
    jmp qword ptr [rax*8 + kernel_accesses]
.user:
    mov eax, r12d
    mov rdx, rdi
    mov rdi, [rax*8 + user_accesses - GROUP_USER * 8]
    mov rsi, USER_STACK_VA + PAGE_SIZE
    mov ecx, 2
    call run_user
    jmp .after
make_access_read:
    mov al, [rdi]
    jmp make_access.after
make_access_write:
    mov byte ptr [rdi], RET
    jmp make_access.after
make_access_fetch:
    call rdi
make_access.after:
    ENDTRY
    test r13d, CASE_AC
    jz .no_ac
    clac
.no_ac:
    mov rcx, [saved_cr4]
    mov cr4, rcx
    mov rcx, [saved_cr0]
    mov cr0, rcx
    ret

; Compares with r14; counts in rbx and prints the first case that is wrong.
judge:
    mov rax, -1
    cmp qword ptr [caught_vector], -1
    je .have_result
    mov rax, [caught_error]
    cmp qword ptr [caught_vector], 14
    je .have_result
    mov rax, [caught_vector]
    add rax, 0xbad00
.have_result:
    cmp rax, r14
    jne .wrong
    mov rcx, [matrix_pte]
    mov rcx, [rcx]
    cmp rax, -1
    je .no_fault
    mov rdx, MATRIX_VA + TARGET_OFFSET
    cmp [caught_cr2], rdx
    jne .wrong
    xor edx, edx
    and ecx, PTE_D                       ; a fault never sets D
    jmp .bits
.no_fault:
    mov edx, PTE_A
    cmp r12b, ACCESS_WRITE
    je .written
    cmp r12b, ACCESS_WRITE + GROUP_USER
    jne .compare
.written:
    mov edx, PTE_A | PTE_D
.compare:
    and ecx, PTE_A | PTE_D
.bits:
    cmp ecx, edx
    jne .wrong
    ret
.wrong:
    inc ebx
    cmp ebx, 1
    jne .end
    PRINT "case "
    PRINT_HEX r13
    PRINT ": got "
    PRINT_HEX rax
    PRINT ", want "
    PRINT_HEX r14
    PRINT ", entry "
    mov rcx, [matrix_pte]
    PRINT_HEX qword ptr [rcx]
    PRINT ", CR2 "
    PRINT_HEX qword ptr [caught_cr2]
    PRINT "\n"
.end:
    ret

; What runs in ring 3, at USER_TEXT_VA: no absolute addresses.
.align 4096
user_text:
user_read:
    mov al, [rdi]
    int VECTOR_USER_EXIT
user_write:
    mov byte ptr [rdi], RET
    int VECTOR_USER_EXIT
user_fetch:
    call rdi
    int VECTOR_USER_EXIT
user_demand:
    .equ USER_DEMAND, USER_TEXT_VA + user_demand - user_text
    DEMAND_PROGRAM
.align 4096

.section rodata
.align 8
kernel_accesses: .quad make_access_read, make_access_write, make_access_fetch
user_accesses:
    .quad USER_TEXT_VA + user_read - user_text, USER_TEXT_VA + user_write - user_text
    .quad USER_TEXT_VA + user_fetch - user_text
group_names:     .quad name_0, name_1, name_2, 0, name_4, name_5, name_6
group_controls:                          ; what a group depends on
    .long CASE_SMAP | CASE_AC, CASE_WP | CASE_SMAP | CASE_AC, CASE_SMEP, 0, 0, 0, 0
name_0: .asciz "rights of ring 0 to read"
name_1: .asciz "rights of ring 0 to write"
name_2: .asciz "rights of ring 0 to fetch"
name_4: .asciz "rights of ring 3 to read"
name_5: .asciz "rights of ring 3 to write"
name_6: .asciz "rights of ring 3 to fetch"

.section bss
.align 8
matrix_pde:     .skip 8
matrix_pte:     .skip 8
matrix_table:   .skip 8
matrix_frame:   .skip 8
saved_cr0:      .skip 8
saved_cr4:      .skip 8
.section text
