; paging-pae: in PAE paging each entry decides as the SDM says, and the PDPTEs are registers
;
; From 64-bit mode the CPU goes back to 32-bit protected mode and turns on PAE paging. First every combination
; of P, R/W, U/S and XD of a PTE, R/W and U/S of its PDE and CR0.WP for reads, writes and fetches of rings 0
; and 3; then the PDPTE registers, which change at MOV to CR3 only; large pages, reserved bits and INVLPG.
.include "runtime.inc"
.include "modes.inc"
.include "modes-matrix.inc"

.equ VA, 0x80000000
.equ LARGE_VA, 0x80200000                ; the next entry of the same directory
.equ MOVED_VA, 0xC0000000
.equ FULL, PTE_P + PTE_W + PTE_U
.equ MARK_A, 0x11111111
.equ MARK_B, 0x22222222

main:
    cmp byte ptr [have_nx], 0
    jne .nx
    SKIP "PAE paging", "this CPU has no XD"
    ret
.nx:
    call page_alloc
    mov [frame_a], eax
    mov dword ptr [rax + 0x10], MARK_A
    call page_alloc
    mov [frame_b], eax
    mov dword ptr [rax + 0x10], MARK_B
    mov eax, VA
    mov [matrix32_va], eax
    mov dword ptr [matrix32_pte], table
    mov dword ptr [matrix32_pde], directory
    mov dword ptr [matrix32_table], table
    mov dword ptr [matrix32_nx], 1
    mov eax, [frame_a]
    mov [matrix32_frame], eax
    call build_tables
    mov edi, legacy
    mov esi, CR4_PAE
    mov edx, pointers
    mov ecx, EFER_NXE
    call run_in_mode
    CHECK_EQ "the guest came back from PAE paging", rax, 0
    call report_matrix32
    mov eax, [seen_first]
    CHECK_EQ "a page shows its frame", rax, MARK_A
    mov eax, [seen_after_invlpg]
    CHECK_EQ "after INVLPG it shows the new one", rax, MARK_B
    mov eax, [seen_large]
    CHECK_EQ "a 2M page shows its memory", rax, MARK_B
    mov eax, [large_flags]
    CHECK_EQ "a store sets A and D in the 2M entry", rax, PTE_A + PTE_D
    mov eax, [large_reserved]
    CHECK_EQ "bit 13 of a 2M entry is reserved", rax, 9
    mov eax, [large_nx]
    CHECK_EQ "XD of a 2M entry refuses a fetch", rax, 0x11
    mov eax, [reserved_52]
    CHECK_EQ "bit 52 of a PTE is reserved, other than in 4-level paging", rax, 0xD
    mov eax, [reserved_nx]
    CHECK_EQ "XD is reserved with EFER.NXE clear", rax, 9
    mov eax, [fetch_without_nx]
    CHECK_EQ "and a refused fetch is then reported as a read", rax, 4
    mov eax, [no_pointer]
    CHECK_EQ "an absent PDPTE refuses with P clear", rax, 6
    mov eax, [seen_moved]
    CHECK_EQ "MOV to CR3 loads the PDPTE that was written", rax, MARK_A
    cmp byte ptr [have_host], 0
    jne .registers
    SKIP "PDPTEs are registers", "QEMU's TCG reads PDPTEs from memory"
    SKIP "MOV to CR3 refuses a reserved bit in a PDPTE", "QEMU's TCG finds it when it walks"
    ret
.registers:
    mov eax, [still_absent]
    CHECK_EQ "a PDPTE written to memory is not seen before", rax, 0
    mov eax, [bad_pointer]
    CHECK_EQ "MOV to CR3 refuses a reserved bit in a PDPTE", rax, 0x100D
    ret

; The first 4 MiB as they are, for ring 3, too; VA by `directory` and `table`.
build_tables:
    mov ecx, 1024
    mov eax, FULL
    mov edi, identity
.page:
    mov [rdi], rax
    add rax, PAGE_SIZE
    add edi, 8
    dec ecx
    jnz .page
    mov eax, identity + FULL
    mov [low_directory], rax
    add eax, PAGE_SIZE
    mov [low_directory + 8], rax
    mov eax, low_directory + PTE_P
    mov [pointers], rax
    mov eax, directory + PTE_P
    mov [pointers + 16], rax
    ret

.bits 32
legacy:
    call run_matrix32
    mov dword ptr [directory], table + FULL
    mov eax, [frame_a]
    call set_pte
    mov edi, VA
    mov eax, [edi + 0x10]
    mov [seen_first], eax
    mov eax, [frame_b]
    call set_pte
    mov eax, [edi + 0x10]
    mov [seen_after_invlpg], eax
    mov eax, [frame_a]
    call set_pte
    call large_pages
    call reserved_bits
    call pointer_registers
    ret

; eax = the frame behind VA.                 keeps all others
set_pte:
    or eax, FULL
    mov [table], eax
    mov dword ptr [table + 4], 0
    mov eax, VA
    invlpg [eax]
    ret

; The 2M page that holds frame_b.
large_pages:
    mov eax, [frame_b]
    and eax, 0xffe00000
    mov [large_frame], eax
    or eax, FULL + PTE_PS
    mov [directory + 8], eax
    mov edi, [frame_b]
    and edi, 0x1fffff
    or edi, LARGE_VA
    mov eax, [edi + 0x10]
    mov [seen_large], eax
    mov [edi + 0x20], eax
    mov eax, [directory + 8]
    and eax, PTE_A + PTE_D
    mov [large_flags], eax
    mov dword ptr [directory + 12], 0x80000000
    mov eax, LARGE_VA + 0x1ff000
    invlpg [eax]                         ; any address in it
    mov byte ptr [edi], RET_CODE
    mov esi, FETCH32
    xor edx, edx
    call access32
    mov [large_nx], eax
    mov dword ptr [directory + 12], 0
    or dword ptr [directory + 8], 0x2000
    invlpg [edi]
    mov esi, READ32
    xor edx, edx
    call access32
    mov [large_reserved], eax
    mov dword ptr [directory + 8], 0
    invlpg [edi]
    ret

reserved_bits:
    mov edi, VA
    mov dword ptr [table + 4], 0x100000  ; bit 52
    invlpg [edi]
    mov esi, READ32
    mov edx, 1
    call access32
    mov [reserved_52], eax
    mov ecx, MSR_EFER
    rdmsr
    and eax, -EFER_NXE - 1
    wrmsr
    mov dword ptr [table + 4], 0x80000000
    invlpg [edi]
    mov esi, READ32
    xor edx, edx
    call access32
    mov [reserved_nx], eax
    mov dword ptr [table], 0
    mov dword ptr [table + 4], 0
    invlpg [edi]
    mov esi, FETCH32
    mov edx, 1
    call access32
    mov [fetch_without_nx], eax
    mov ecx, MSR_EFER
    rdmsr
    or eax, EFER_NXE
    wrmsr
    mov eax, [frame_a]
    call set_pte
    ret

; The fourth PDPTE: absent, written, loaded; then one with a reserved bit.
pointer_registers:
    mov edi, MOVED_VA
    mov esi, WRITE32
    mov edx, 1
    call access32
    mov [no_pointer], eax
    mov dword ptr [pointers + 24], directory + PTE_P
    invlpg [edi]
    mov esi, READ32
    xor edx, edx
    call access32
    mov [still_absent], eax
    mov eax, cr3
    mov cr3, eax
    mov eax, [edi + 0x10]
    mov [seen_moved], eax
    mov dword ptr [pointers + 24], directory + PTE_P + PTE_W
    mov [try32_esp], esp
    mov dword ptr [try32_eip], .refused
    mov dword ptr [caught32_vector], 0
    mov eax, cr3
    mov cr3, eax
    mov dword ptr [try32_eip], 0
.refused:
    mov eax, [caught32_vector]
    or eax, 0x1000
    mov [bad_pointer], eax
    mov dword ptr [pointers + 24], 0
    mov eax, cr3
    mov cr3, eax
    ret
.bits 64

.section bss
.align 4096
low_directory:  .skip 4096
directory:      .skip 4096
identity:       .skip 2 * 4096
table:          .skip 4096
pointers:       .skip 32
frame_a:        .skip 4
frame_b:        .skip 4
large_frame:    .skip 4
seen_first:     .skip 4
seen_after_invlpg: .skip 4
seen_large:     .skip 4
large_flags:    .skip 4
large_reserved: .skip 4
large_nx:       .skip 4
reserved_52:    .skip 4
reserved_nx:    .skip 4
fetch_without_nx: .skip 4
no_pointer:     .skip 4
still_absent:   .skip 4
seen_moved:     .skip 4
bad_pointer:    .skip 4
.section text
