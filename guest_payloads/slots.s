; slots: memory slots are created, deleted, restored and moved while the guest uses them
;
; A slot's memory appears, vanishes (loads read all ones, stores go nowhere), comes back with its bytes
; and moves to another address; a function in it is called at both places.
;
; param pages=16    pages of the slot
; vmcalls: slot_create slot_delete slot_restore slot_move
.include "runtime.inc"

.equ MOVED_GPA, SLOT_TEST_GPA + 0x400000

main:
    PARAM r12, "pages", 16
    AT_LEAST r12, 2
    PASS "the guest runs without extra slots"
    NEED_HOST "memory slots", .end
    HOST2 VMCALL_SLOT_CREATE, qword ptr [slot_gpa], r12
    mov r14, rax                         ; the slot
    HOST_CHECK "create", 1
    test rax, rax
    jz .end
    mov r13, [slot_gpa]
    call fresh
    call overlap
    call delete_and_restore
    call move
    call storm
    HOST1 VMCALL_SLOT_DELETE, r14
    CHECK_EQ "delete", rax, 0
    HOST1 VMCALL_SLOT_DELETE, r14
    CHECK_EQ "a deleted slot cannot be deleted", rax, -ENOENT
.end:
    ret

fresh:
    xor eax, eax
    mov rsi, r13
    mov rcx, r12
    shl rcx, 9
.word:
    or rax, [rsi]
    add rsi, 8
    dec rcx
    jnz .word
    CHECK_EQ "a new slot reads as zeros", rax, 0
    call fill
    call check
    CHECK_EQ "a slot keeps its bytes", rax, 0
    ret

overlap:
    lea rcx, [r13 + 4096]
    HOST2 VMCALL_SLOT_CREATE, rcx, 1
    CHECK_EQ "slots may not overlap", rax, -EEXIST
    HOST1 VMCALL_SLOT_DELETE, 1000
    CHECK_EQ "an unknown slot", rax, -ENOENT
    HOST1 VMCALL_SLOT_RESTORE, r14
    CHECK_EQ "a slot in use cannot be restored", rax, -EEXIST
    ret

delete_and_restore:
    HOST1 VMCALL_SLOT_DELETE, r14
    CHECK_EQ "delete under use", rax, 0
    mov rax, [r13]
    CHECK_EQ "8 bytes of a deleted slot read all ones", rax, -1
    mov eax, [r13 + 4096]
    mov ecx, 0x7fffffff
    lea rcx, [rcx*2 + 1]
    CHECK_EQ "4 bytes too", rax, rcx
    movzx eax, byte ptr [r13 + 77]
    CHECK_EQ "1 byte too", rax, 255
    mov qword ptr [r13 + 8], 0           ; goes nowhere
    HOST1 VMCALL_SLOT_RESTORE, r14
    CHECK_EQ "restore", rax, 0
    call check
    CHECK_EQ "a restored slot has its old bytes", rax, 0
    ret

move:
    mov dword ptr [r13 + 64], 0xC3077B8D       ; lea edi, [rbx + 7]; ret
    lea rcx, [r13 + 64]
    mov ebx, 30
    call rcx
    CHECK_EQ "code in a slot", rdi, 37
    call fill
    HOST2 VMCALL_SLOT_MOVE, r14, qword ptr [moved_gpa]
    CHECK_EQ "move under use", rax, 0
    mov rax, [r13]
    CHECK_EQ "nothing is left at the old place", rax, -1
    mov r13, [moved_gpa]
    call check
    CHECK_EQ "the bytes are at the new place", rax, 0
    mov dword ptr [r13 + 64], 0xC3077B8D
    lea rcx, [r13 + 64]
    mov ebx, 31
    call rcx
    CHECK_EQ "code at the new place", rdi, 38
    call fill
    HOST2 VMCALL_SLOT_MOVE, r14, qword ptr [slot_gpa]
    CHECK_EQ "move back", rax, 0
    mov r13, [slot_gpa]
    call check
    CHECK_EQ "the bytes came back", rax, 0
    ret

; Twenty deletions and moves with a write between each.
storm:
    xor ebx, ebx
    mov ebp, 20
.turn:
    mov rax, rbp
    shl rax, 9
    add rax, rbp
    mov [r13 + 2048], rax
    HOST1 VMCALL_SLOT_DELETE, r14
    or rbx, rax
    HOST1 VMCALL_SLOT_RESTORE, r14
    or rbx, rax
    mov rcx, [moved_gpa]
    xor rcx, [slot_gpa]
    xor rcx, r13
    HOST2 VMCALL_SLOT_MOVE, r14, rcx
    or rbx, rax
    mov r13, rcx
    mov rax, rbp
    shl rax, 9
    add rax, rbp
    xor rax, [r13 + 2048]
    or rbx, rax
    dec ebp
    jnz .turn
    CHECK_EQ "twenty deletions and moves lose nothing", rbx, 0
    ret

fill:
    mov rdi, r13
    mov esi, 21
    mov rdx, r12
    shl rdx, 9
    jmp fill_words

check:
    mov rdi, r13
    mov esi, 21
    mov rdx, r12
    shl rdx, 9
    jmp check_words

.section rodata
.align 8
slot_gpa:   .quad SLOT_TEST_GPA
moved_gpa:  .quad MOVED_GPA
