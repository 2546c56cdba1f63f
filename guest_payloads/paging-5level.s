; paging-5level: in 5-level paging addresses have 57 bits, the PML5 decides like any table, LA57 stays put
;
; CR4.LA57 cannot change in 64-bit mode: the CPU leaves it, sets the bit and comes back with another root over
; the same tables. Then rights, A and D, reserved bits and INVLPG at the fifth level, addresses above 48 bits,
; those that are not canonical in 57, and the #GP of a change of LA57.
.include "runtime.inc"
.include "modes.inc"

.equ HIGH_VA, 1 << 48                    ; PML5 entry 1
.equ NOT_CANONICAL, 1 << 56
.equ LAST_VA, 0xff00000000000000         ; the lowest of the upper half: PML5 entry 256
.equ FULL, PTE_P + PTE_W + PTE_U
.equ MARK, 0x5EEDF00D

main:
    xor eax, eax
    cpuid
    cmp eax, 7
    jb .absent
    mov eax, 7
    xor ecx, ecx
    cpuid
    bt ecx, 16
    jc .present
.absent:
    SKIP "5-level paging", "this CPU has no LA57"
    ret
.present:
    mov eax, 0x80000008
    cpuid
    movzx eax, ah
    CHECK_EQ "CPUID tells of 57 linear-address bits", rax, 57
    mov rdi, NOT_CANONICAL >> 8
    call probe
    CHECK_EQ "address 2^48 is not canonical in 4-level paging", qword ptr [caught_vector], 13
    mov rax, cr3
    or rax, FULL
    mov [pml5], rax
    mov eax, high_tables + FULL
    mov [pml5 + 8], rax
    mov [pml5 + 256 * 8], rax
    mov eax, high_tables + PAGE_SIZE + FULL
    mov [high_tables], rax
    add eax, PAGE_SIZE
    mov [high_tables + PAGE_SIZE], rax
    add eax, PAGE_SIZE
    mov [high_tables + 2 * PAGE_SIZE], rax
    call page_alloc
    mov rcx, MARK
    mov [rax + 0x10], rcx
    or rax, FULL
    mov [high_tables + 3 * PAGE_SIZE], rax
    mov edi, five_levels
    mov esi, CR4_PAE + CR4_LA57
    mov edx, pml5
    mov ecx, EFER_LME
    cmp byte ptr [have_nx], 0
    je .switch
    or ecx, EFER_NXE                     ; the tables below have XD
.switch:
    call run_in_mode
    mov rax, cr4
    and eax, CR4_LA57
    CHECK_EQ "the guest came back to 4-level paging", rax, 0
    mov rdi, HIGH_VA
    call probe
    CHECK_EQ "where 2^48 is not canonical again", qword ptr [caught_vector], 13
    ret

; Reads rdi; what came is in caught_*.      keeps rdi
probe:
    mov qword ptr [caught_vector], -1
    TRY .after
    mov rax, [rdi + 0x10]
.after:
    ENDTRY
    ret

; Writes rdi + 0x20.                        keeps rdi
probe_write:
    TRY .after
    mov [rdi + 0x20], rdi
.after:
    ENDTRY
    ret

five_levels:
    mov rax, cr4
    and eax, CR4_LA57
    CHECK_EQ "CR4.LA57 is set in 64-bit mode", rax, CR4_LA57
    mov rcx, HIGH_VA
    mov rax, [rcx + 0x10]
    CHECK_EQ "an address above 2^48 shows its page", rax, MARK
    mov rcx, LAST_VA
    mov rax, [rcx + 0x10]
    CHECK_EQ "so does the lowest address of the upper half", rax, MARK
    mov rax, [pml5 + 8]
    and eax, PTE_A + PTE_D
    CHECK_EQ "the PML5 entry has A and no D", rax, PTE_A
    mov rdi, HIGH_VA
    call probe_write
    mov rax, [high_tables + 3 * PAGE_SIZE]
    and eax, PTE_A + PTE_D
    CHECK_EQ "a store sets D in the last entry", rax, PTE_A + PTE_D
    and byte ptr [pml5 + 8], -PTE_W - 1
    invlpg [rdi]
    call probe_write
    CHECK_EQ "a read-only PML5 entry refuses a store", qword ptr [caught_error], 3
    mov rax, [caught_cr2]
    lea rcx, [rdi + 0x20]
    CHECK_EQ "CR2 has all 57 bits", rax, rcx
    or byte ptr [pml5 + 8], PTE_W + PTE_PS
    invlpg [rdi]
    call probe
    CHECK_EQ "bit 7 of a PML5 entry is reserved", qword ptr [caught_error], 9
    mov qword ptr [pml5 + 8], 0
    invlpg [rdi]
    call probe
    CHECK_EQ "an absent PML5 entry refuses with P clear", qword ptr [caught_error], 0
    CHECK_EQ "and that is a page fault", qword ptr [caught_vector], 14
    mov rdi, NOT_CANONICAL
    call probe
    CHECK_EQ "address 2^56 is not canonical", qword ptr [caught_vector], 13
    mov qword ptr [caught_vector], -1
    TRY .refused
    mov rax, cr4
    btr rax, 12
    mov cr4, rax
.refused:
    ENDTRY
    CHECK_EQ "CR4.LA57 cannot be cleared in 64-bit mode", qword ptr [caught_vector], 13
    ret

.section bss
.align 4096
pml5:           .skip 4096
high_tables:    .skip 4 * 4096
.section text
