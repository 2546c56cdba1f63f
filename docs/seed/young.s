; young: the host asks twice whether a page was used
;
; vmcalls: age
.include "runtime.inc"

main:
    mov edi, 1
    call pages_alloc
    mov r12, rax
    mov dword ptr [r12], 1
    HOST2 VMCALL_AGE, r12, 1
    mov r13, rax
    HOST2 VMCALL_AGE, r12, 1
    mov r14, rax
    CHECK_EQ "young after a store", r13, 1
    CHECK_EQ "young without one", r14, 0
    ret
