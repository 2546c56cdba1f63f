; swap: a page is written, swapped out by the host, and read again
;
; vmcalls: swap_out
.include "runtime.inc"

main:
    mov edi, 1
    call pages_alloc
    mov r12, rax
    mov dword ptr [r12], 4711
    HOST2 VMCALL_SWAP_OUT, r12, 1
    mov eax, [r12]
    CHECK_EQ "the page after its way through the swap file", rax, 4711
    ret
