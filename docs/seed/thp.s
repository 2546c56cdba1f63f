; thp: a huge page is written, and one of its 512 pages is discarded
;
; vmcalls: thp_enable dontneed
.include "runtime.inc"

main:
    mov rdi, [heap_next]
    add rdi, PAGE_2M - 1
    and rdi, -PAGE_2M
    mov [heap_next], rdi
    mov edi, 512
    call pages_alloc
    mov r12, rax
    HOST2 VMCALL_THP_ENABLE, r12, 512
    mov dword ptr [r12 + 0x3000], 1
    lea rdi, [r12 + 0x5000]
    HOST2 VMCALL_DONTNEED, rdi, 1
    mov eax, [r12 + 0x3000]
    CHECK_EQ "a neighbour of the discarded page", rax, 1
    ret
