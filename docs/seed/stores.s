; stores: a page is written, swapped out by the host, and written again
;
; vmcalls: swap_out
.include "runtime.inc"

main:
    mov edi, 1
    call pages_alloc
    mov r12, rax
    mov dword ptr [r12], 1
    HOST2 VMCALL_SWAP_OUT, r12, 1
    mov dword ptr [r12], 2
    mov eax, [r12]
    CHECK_EQ "the page", rax, 2
    ret
