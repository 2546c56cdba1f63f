; alias: one page at two addresses of the guest, written by both, then swapped out by the host
;
; vmcalls: swap_out
.include "runtime.inc"

main:
    mov edi, 1
    call pages_alloc
    mov r12, rax
    mov rdi, TEST_VA
    lea rsi, [r12 + PTE_P + PTE_W]
    call map_page
    mov r13, TEST_VA
    mov dword ptr [r12], 1
    mov dword ptr [r13], 2
    HOST2 VMCALL_SWAP_OUT, r12, 1
    mov eax, [r12]
    CHECK_EQ "the page by its first address", rax, 2
    mov eax, [r13]
    CHECK_EQ "the page by its second address", rax, 2
    ret
