; aging: the host finds young the pages that the guest used since it last looked, and no others
;
; The host clears the accessed bits of a range, the guest touches some pages by loads, stores and
; fetches, the host looks again. (A host too small to leave the pages in place finds fewer.)
;
; param pages=64    pages watched, at least 16
; param rounds=3    how often
; vmcalls: age map_level
.include "runtime.inc"

main:
    PARAM r12, "pages", 64
    PARAM r14, "rounds", 3
    AT_LEAST r12, 16
    AT_LEAST r14, 1
    mov rdi, r12
    call pages_alloc
    mov r13, rax
    mov rdi, r13
    mov esi, 3
    mov rdx, r12
    shl rdx, 9
    call fill_words
    call touch_some
    call check_all
    CHECK_EQ "the watched pages keep their bytes", rax, 0
    NEED_HOST "aging", .end
    HOST2 VMCALL_AGE, r13, r12
    HOST_CHECK "pages just written are young", r12
    test rax, rax
    jz .end
    HOST1 VMCALL_MAP_LEVEL, r13
    cmp rax, 2
    jb .small
    SKIP "young pages one by one", "the range is mapped by huge pages"
    jmp .end
.small:
    call one_round
    dec r14
    jnz .small
    call check_all
    CHECK_EQ "the watched pages keep their bytes under aging", rax, 0
.end:
    ret

one_round:
    HOST2 VMCALL_AGE, r13, r12           ; forget
    HOST2 VMCALL_AGE, r13, r12
    CHECK_EQ "pages left alone are old", rax, 0
    call touch_some
    HOST2 VMCALL_AGE, r13, r12
    CHECK_EQ "as many young pages as were touched", rax, 4
    call touch_some
    lea rcx, [r13 + 5 * 4096]
    HOST2 VMCALL_AGE, rcx, 1
    CHECK_EQ "a page touched by a store is young", rax, 1
    lea rcx, [r13 + 2 * 4096]
    HOST2 VMCALL_AGE, rcx, 1
    CHECK_EQ "a page touched by a load is young", rax, 1
    lea rcx, [r13 + 6 * 4096]
    HOST2 VMCALL_AGE, rcx, 1
    CHECK_EQ "its neighbour is old", rax, 0
    HOST2 VMCALL_AGE, code_page, 1
    call code_page
    HOST2 VMCALL_AGE, code_page, 1
    CHECK_EQ "a page touched by a fetch is young", rax, 1
    ret

; A load of page 2, a store to 5, a read-modify-write of 8, a load that crosses from 8 to 9.
touch_some:
    mov rax, [r13 + 2 * 4096]
    mov rax, [r13 + 5 * 4096]
    mov [r13 + 5 * 4096], rax
    lock add qword ptr [r13 + 8 * 4096], 0
    mov rax, [r13 + 9 * 4096 - 4]
    ret

check_all:
    mov rdi, r13
    mov esi, 3
    mov rdx, r12
    shl rdx, 9
    jmp check_words

.align 4096
code_page:
    ret
.align 4096
