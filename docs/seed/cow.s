; cow: a page is read, then written, then shared by a fork and written again
;
; vmcalls: fork
.include "runtime.inc"

main:
    mov edi, 1
    call pages_alloc
    mov r12, rax
    mov eax, [r12]
    mov dword ptr [r12], 1
    HOST0 VMCALL_FORK
    mov dword ptr [r12], 2
    mov eax, [r12]
    CHECK_EQ "the page", rax, 2
    ret
