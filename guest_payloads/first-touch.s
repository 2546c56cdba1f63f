; first-touch: every page is touched for the first time, by a read, a write, a read-modify-write, a fetch
;
; The pages of the heap are touched one after the other, each first in another way: a load (fresh memory
; reads as zeros), a store, a locked increment, a push, and an instruction that runs over the page's end.
; Each first touch is one EPT violation and one host fault; then everything is read back.
;
; param mib=8    how much memory to touch
.include "runtime.inc"

.equ WAYS, 4

main:
    PARAM r12, "mib", 8
    AT_LEAST r12, 1
    shl r12, 8                           ; pages
    mov rdi, r12
    call pages_alloc
    mov r13, rax
    call touch_all
    CHECK_EQ "a first read finds zeros", r14, 0
    call verify_all
    CHECK_EQ "each page keeps what its first touch left", rax, 0
    call fetch_first
    ret

; Page i is first touched by way i % WAYS. r14 = pages whose first read was not zero.
touch_all:
    xor r14d, r14d
    xor ebx, ebx
.page:
    mov rdi, rbx
    shl rdi, 12
    add rdi, r13
    mov eax, ebx
    and eax, WAYS - 1
    jmp qword ptr [rax*8 + touch_ways]
touch_read:
    cmp qword ptr [rdi + 8], 0
    je touched
    inc r14
    jmp touched
touch_write:
    mov [rdi + 8], rbx
    jmp touched
touch_increment:
    lock inc qword ptr [rdi + 8]
    jmp touched
touch_push:
    mov rax, rsp
    lea rsp, [rdi + 16]
    push rbx
    mov rsp, rax
touched:
    inc rbx
    cmp rbx, r12
    jb touch_all.page
    ret

; rax = pages whose word is not what its way leaves.
verify_all:
    xor eax, eax
    xor ebx, ebx
.page:
    mov rdi, rbx
    shl rdi, 12
    add rdi, r13
    xor edx, edx                         ; after a read: still zero
    mov ecx, ebx
    and ecx, WAYS - 1
    jz .compare
    mov edx, 1                           ; after an increment of zero
    cmp ecx, 2
    je .compare
    mov rdx, rbx
.compare:
    cmp [rdi + 8], rdx
    je .same
    inc rax
.same:
    inc rbx
    cmp rbx, r12
    jb .page
    ret

; A fetch is the first touch of page A: its last two bytes, zeros, are `add [rax], al`; page B behind it
; returns.
fetch_first:
    mov edi, 3
    call pages_alloc
    lea r15, [rax + PAGE_SIZE]
    mov byte ptr [r15], 0xC3
    lea r14, [r15 + PAGE_SIZE]           ; the word it adds to
    mov byte ptr [r14], 5
    mov rax, r14
    lea rdx, [r15 - 2]
    call rdx
    movzx ecx, byte ptr [r14]
    movzx eax, r14b
    add eax, 5
    movzx eax, al
    CHECK_EQ "a first fetch runs what fresh memory says", rcx, rax
    ret

.section rodata
.align 8
touch_ways: .quad touch_read, touch_write, touch_increment, touch_push
