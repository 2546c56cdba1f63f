; dirty-log: the log names exactly the pages that were written since it was last fetched
;
; Logging is switched on for the slot of the payload's RAM. Stores of all kinds must show in the bitmap,
; loads and fetches must not, a fetched log starts empty, and a page that was swapped out after it was
; written stays in the log. (A host too small to leave the watched pages in place logs more.)
;
; param pages=64    pages watched, at least 32
; vmcalls: dirty_log get_dirty swap_out
.include "runtime.inc"

main:
    PARAM r12, "pages", 64
    AT_LEAST r12, 32
    mov rdi, r12
    call pages_alloc
    mov r13, rax
    mov rdi, r13
    mov esi, 7
    mov rdx, r12
    shl rdx, 9
    call fill_words
    call write_some
    call check_memory
    CHECK_EQ "the watched pages hold what was written", rax, 0
    NEED_HOST "dirty log", .end
    HOST2 VMCALL_DIRTY_LOG, r13, 1
    HOST_CHECK "logging on", 0
    test rax, rax
    jz .end
    call logged_tests
    HOST2 VMCALL_DIRTY_LOG, r13, 0
    CHECK_EQ "logging off", rax, 0
    HOST3 VMCALL_GET_DIRTY, r13, r12, 0
    CHECK_EQ "no log without logging", rax, -ENOENT
    call write_some
    call check_memory
    CHECK_EQ "the guest writes without the log", rax, 0
.end:
    ret

logged_tests:
    call fetch_log
    call fetch_log
    CHECK_EQ "a log just fetched is empty", rax, 0
    call read_all
    call fetch_log
    CHECK_EQ "loads are not logged", rax, 0
    call write_some
    call fetch_log
    CHECK_EQ "as many pages as were written", rax, 5
    mov rax, [bitmap]
    mov rcx, (1 << 1) | (1 << 4) | (1 << 9) | (1 << 30) | (1 << 31)
    CHECK_EQ "and exactly these", rax, rcx
    call write_some
    call fetch_log
    CHECK_EQ "they are logged again when written again", rax, 5
    call write_some
    HOST2 VMCALL_SWAP_OUT, r13, r12
    HOST_CHECK "swap_out of logged pages", r12
    call fetch_log
    CHECK_EQ "swapped-out pages stay in the log", rax, 5
    call check_memory
    CHECK_EQ "their bytes come back", rax, 0
    call fetch_log                       ; KVM logs what a load brought back writable, too: no claim here
    lock inc qword ptr [r13 + 512]
    lock dec qword ptr [r13 + 512]
    mov rax, [r13 + 512]
    lock cmpxchg [r13 + 2 * 4096 + 512], rcx     ; a compare that fails writes all the same
    call fetch_log
    CHECK_EQ "read-modify-writes are logged", qword ptr [bitmap], 5
    ret

; rax = dirty pages of the range; their bits in `bitmap`.
fetch_log:
    mov qword ptr [bitmap], 0
    HOST3 VMCALL_GET_DIRTY, r13, r12, bitmap
    ret

read_all:
    mov rsi, r13
    mov rcx, r12
    shl rcx, 9
.word:
    lodsq
    dec rcx
    jnz .word
    ret

; Stores to pages 1, 4, 9 and across the border of 30 and 31, of the bytes that are there.
write_some:
    mov rax, [r13 + 1 * 4096 + 16]
    mov [r13 + 1 * 4096 + 16], rax
    mov al, [r13 + 4 * 4096 + 4095]
    mov [r13 + 4 * 4096 + 4095], al
    lea rdi, [r13 + 9 * 4096]
    mov rsi, rdi
    mov ecx, 100
    rep movsb
    mov rax, [r13 + 31 * 4096 - 4]
    mov [r13 + 31 * 4096 - 4], rax
    ret

check_memory:
    mov rdi, r13
    mov esi, 7
    mov rdx, r12
    shl rdx, 9
    jmp check_words

.section bss
.align 8
bitmap: .skip 4096
