; paging-32bit: in 32-bit paging each entry, large page, INVLPG and MOV to CR3 decides as the SDM says
;
; From 64-bit mode the CPU goes back to 32-bit protected mode and turns on the oldest paging there is. First
; every combination of P, R/W and U/S of a PTE, R/W and U/S of its PDE and CR0.WP for reads, writes and
; fetches of rings 0 and 3; then large pages with and without CR4.PSE, reserved bits, INVLPG and CR3.
.include "runtime.inc"
.include "modes.inc"
.include "modes-matrix.inc"

.equ VA, 0x80000000
.equ VA_INDEX, VA >> 22
.equ LARGE_VA, 0xA0000000
.equ LARGE_INDEX, LARGE_VA >> 22
.equ FULL, PTE_P + PTE_W + PTE_U
.equ MARK_A, 0x11111111
.equ MARK_B, 0x22222222

main:
    call page_alloc
    mov [frame_a], eax
    mov dword ptr [rax + 0x10], MARK_A
    call page_alloc
    mov [frame_b], eax
    mov dword ptr [rax + 0x10], MARK_B
    mov eax, VA
    mov [matrix32_va], eax
    mov dword ptr [matrix32_pte], table
    mov dword ptr [matrix32_pde], directory + VA_INDEX * 4
    mov dword ptr [matrix32_table], table
    mov eax, [frame_a]
    mov [matrix32_frame], eax
    call build_tables
    mov edi, legacy
    mov esi, CR4_PSE
    mov edx, directory
    xor ecx, ecx
    call run_in_mode
    CHECK_EQ "the guest came back from 32-bit paging", rax, 0
    call report_matrix32
    mov eax, [seen_first]
    CHECK_EQ "a page shows its frame", rax, MARK_A
    mov eax, [seen_after_invlpg]
    CHECK_EQ "after INVLPG it shows the new one", rax, MARK_B
    mov eax, [seen_after_cr3]
    CHECK_EQ "after MOV to CR3 it shows the first again", rax, MARK_A
    mov eax, [seen_large]
    CHECK_EQ "a 4M page shows its memory", rax, MARK_B
    mov eax, [large_flags]
    CHECK_EQ "a store sets A and D in the 4M entry", rax, PTE_A + PTE_D
    mov eax, [large_readonly]
    CHECK_EQ "a read-only 4M page refuses a store", rax, 3
    mov eax, [large_reserved]
    CHECK_EQ "bit 21 of a 4M entry is reserved", rax, 9
    mov eax, [large_stale]
    CHECK_EQ "INVLPG of any address in a 4M page drops it", rax, 0
    mov eax, [without_pse]
    CHECK_EQ "without CR4.PSE bit 7 is ignored", rax, MARK_A
    mov eax, [no_directory]
    CHECK_EQ "an absent PDE refuses with P clear", rax, 4
    ret

; The first 4 MiB as they are, for ring 3, too; VA by `table`.
build_tables:
    mov ecx, 1024
    mov eax, FULL
    mov edi, identity
.page:
    mov [rdi], eax
    add eax, PAGE_SIZE
    add edi, 4
    dec ecx
    jnz .page
    mov dword ptr [directory], identity + FULL
    ret

.bits 32
legacy:
    call run_matrix32
    mov dword ptr [directory + VA_INDEX * 4], table + FULL
    mov eax, [frame_a]
    or eax, FULL
    mov [table], eax
    mov edi, VA
    invlpg [edi]
    mov ecx, VA
    mov eax, [ecx + 0x10]
    mov [seen_first], eax
    mov eax, [frame_b]
    or eax, FULL
    mov [table], eax
    invlpg [edi]
    mov eax, [ecx + 0x10]
    mov [seen_after_invlpg], eax
    mov eax, [frame_a]
    or eax, FULL
    mov [table], eax
    mov eax, cr3
    mov cr3, eax
    mov eax, [ecx + 0x10]
    mov [seen_after_cr3], eax
    call large_pages
    mov dword ptr [directory + VA_INDEX * 4], 0
    mov edi, VA
    invlpg [edi]
    mov esi, READ32
    mov edx, 1
    call access32
    mov [no_directory], eax
    ret

; The 4M page that holds frame_b.
large_pages:
    mov eax, [frame_b]
    and eax, 0xffc00000
    mov [large_frame], eax
    or eax, FULL + PTE_PS
    mov [directory + LARGE_INDEX * 4], eax
    mov edi, [frame_b]
    and edi, 0x3fffff
    or edi, LARGE_VA
    mov eax, [edi + 0x10]
    mov [seen_large], eax
    mov [edi + 0x20], eax
    mov eax, [directory + LARGE_INDEX * 4]
    and eax, PTE_A + PTE_D
    mov [large_flags], eax
    mov eax, [large_frame]
    or eax, PTE_P + PTE_U + PTE_PS
    mov [directory + LARGE_INDEX * 4], eax
    invlpg [edi]
    mov esi, WRITE32
    xor edx, edx
    call access32
    mov [large_readonly], eax
    mov eax, [large_frame]
    or eax, FULL + PTE_PS + 0x200000
    mov [directory + LARGE_INDEX * 4], eax
    invlpg [edi]
    mov esi, READ32
    xor edx, edx
    call access32
    mov [large_reserved], eax
    mov eax, [large_frame]
    or eax, FULL + PTE_PS
    mov [directory + LARGE_INDEX * 4], eax
    mov al, [edi]
    mov dword ptr [directory + LARGE_INDEX * 4], 0
    mov eax, LARGE_VA + 0x3ff000
    invlpg [eax]
    mov esi, READ32
    xor edx, edx
    call access32
    mov [large_stale], eax
    xor eax, eax
    mov cr4, eax
    mov dword ptr [directory + LARGE_INDEX * 4], table + FULL + PTE_PS
    mov eax, cr3
    mov cr3, eax
    mov edi, LARGE_VA
    mov eax, [edi + 0x10]
    mov [without_pse], eax
    mov eax, CR4_PSE
    mov cr4, eax
    ret
.bits 64

.section bss
.align 4096
directory:      .skip 4096
identity:       .skip 4096
table:          .skip 4096
frame_a:        .skip 4
frame_b:        .skip 4
large_frame:    .skip 4
seen_first:     .skip 4
seen_after_invlpg: .skip 4
seen_after_cr3: .skip 4
seen_large:     .skip 4
large_flags:    .skip 4
large_readonly: .skip 4
large_reserved: .skip 4
large_stale:    .skip 4
without_pse:    .skip 4
no_directory:   .skip 4
.section text
