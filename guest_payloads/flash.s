; flash: a read-only slot is memory to read and to run, and every store to it is the device's
;
; NOR flash in the manner of QEMU's: reads are memory's, stores are commands; while a command is open the slot
; is gone and reads answer the status. The host takes its pages meanwhile.
;
; param pages=4     pages of the flash
; param rounds=8    bytes programmed, each with pages taken away before
; vmcalls: flash swap_out migrate slot_delete slot_create
.include "runtime.inc"

.equ READY, 0x80
.equ CODE, 64                            ; of page 0: a function
.equ ZERO, 0x200                         ; of page 0: 8 bytes of zeros
.equ WORK, 0x800                         ; of page 0: where bytes are programmed, all ones
.equ WORK_BYTES, 256

main:
    PARAM r12, "pages", 4
    AT_LEAST r12, 2
    PASS "the guest runs without flash"
    NEED_HOST "flash", .end
    call image
    HOST3 VMCALL_FLASH, qword ptr [flash_gpa], r12, r15
    mov r14, rax                         ; the slot
    HOST_CHECK "flash", 1
    test rax, rax
    jz .end
    mov r13, [flash_gpa]
    HOST3 VMCALL_FLASH, qword ptr [other_gpa], r12, r15
    CHECK_EQ "there is one only", rax, -EEXIST
    HOST2 VMCALL_SLOT_CREATE, r13, 1
    CHECK_EQ "no slot lies over it", rax, -EEXIST
    call differs
    CHECK_EQ "it reads as its image", rax, 0
    call runs
    call modifies
    call programs
    call erases
    call rounds
.end:
    ret

; r15 = the image, r12 pages: numbered words, a function, and room to program
image:
    mov rcx, r12
.page:
    call page_alloc
    mov r15, rax
    dec rcx
    jnz .page
    mov rax, r12
    dec rax
    shl rax, 12
    sub r15, rax
    mov rcx, r12
    shl rcx, 9
.word:
    mov rax, rcx
    imul rax, rax, 0x1F3D5B79
    mov [r15 + rcx*8 - 8], rax
    dec rcx
    jnz .word
    mov dword ptr [r15 + CODE], 0xC3077B8D       ; lea edi, [rbx + 7]; ret
    mov qword ptr [r15 + ZERO], 0
    lea rdi, [r15 + WORK]
    mov eax, 0xFF
    mov ecx, WORK_BYTES
    rep stosb
    ret

; rax = words of the flash that are not as in the image
differs:
    push rcx
    push rdx
    xor eax, eax
    mov rcx, r12
    shl rcx, 9
.word:
    mov rdx, [r13 + rcx*8 - 8]
    cmp rdx, [r15 + rcx*8 - 8]
    je .same
    inc rax
.same:
    dec rcx
    jnz .word
    pop rdx
    pop rcx
    ret

runs:
    lea rcx, [r13 + CODE]
    mov ebx, 30
    call rcx
    CHECK_EQ "code in flash", rdi, 37
    HOST2 VMCALL_SWAP_OUT, r13, r12
    lea rcx, [r13 + CODE]
    mov ebx, 31
    call rcx
    CHECK_EQ "code in flash that was away", rdi, 38
    call differs
    CHECK_EQ "all came back", rax, 0
    ret

; CHECK_AL "name": al is the status everywhere; the array comes back as it was
.macro CHECK_AL name
    movzx eax, al
    CHECK_EQ \name, rax, READY
    mov al, [r13 + 0x1001]
    movzx eax, al
    CHECK_EQ "the status is everywhere", rax, READY
    mov byte ptr [r13], 0xFF
    call differs
    CHECK_EQ "and the array as it was", rax, 0
.endm

; Read by memory, written to the device: what is written is the command to show the status.
modifies:
    or byte ptr [r13 + ZERO], 0x70
    mov al, [r13 + ZERO]
    CHECK_AL "OR"
    lock or byte ptr [r13 + ZERO], 0x70
    mov al, [r13 + ZERO]
    CHECK_AL "LOCK OR"
    mov cl, 0x70
    xchg cl, [r13 + ZERO]
    mov [was], cl
    mov al, [r13 + ZERO]
    CHECK_AL "XCHG"
    movzx eax, byte ptr [was]
    CHECK_EQ "what XCHG took was the array's", rax, 0
    xor eax, eax
    mov cl, 0x70
    lock cmpxchg [r13 + ZERO], cl
    setz [was]
    mov al, [r13 + ZERO]
    CHECK_AL "LOCK CMPXCHG"
    movzx eax, byte ptr [was]
    CHECK_EQ "that exchanged", rax, 1
    lea rdi, [r13 + ZERO]
    mov al, 0x70
    stosb
    mov al, [r13 + ZERO]
    CHECK_AL "STOS"
    ret

programs:
    mov byte ptr [r13 + WORK], 0x40
    mov byte ptr [r13 + WORK], 0x5A
    mov al, [r13 + WORK]
    movzx eax, al
    CHECK_EQ "a byte is programmed", rax, READY
    mov byte ptr [r13], 0xFF
    mov byte ptr [r15 + WORK], 0x5A
    call differs
    CHECK_EQ "and nothing else", rax, 0
    mov byte ptr [r13 + WORK], 0x10
    mov byte ptr [r13 + WORK], 0xF0
    mov byte ptr [r13], 0xFF
    mov byte ptr [r15 + WORK], 0x50
    call differs
    CHECK_EQ "bits go to zero only", rax, 0
    mov byte ptr [r13 + WORK], 0x40
    mov rax, 0x1122334455667788
    mov [r13 + WORK + 8], rax
    mov byte ptr [r13], 0xFF
    mov [r15 + WORK + 8], rax
    call differs
    CHECK_EQ "8 bytes at once", rax, 0
    ret

erases:
    mov byte ptr [r13 + 0x1000], 0x20
    mov byte ptr [r13 + 0x1000], 0xD0
    mov byte ptr [r13], 0xFF
    lea rdi, [r15 + 0x1000]
    mov rax, -1
    mov ecx, 512
    rep stosq
    call differs
    CHECK_EQ "a block is erased", rax, 0
    mov byte ptr [r13 + 0x1000], 0x20
    mov byte ptr [r13 + 0x1000], 0x12
    mov byte ptr [r13], 0x70
    mov al, [r13]
    movzx eax, al
    CHECK_EQ "a command that is not confirmed", rax, READY | 0x30
    mov byte ptr [r13], 0x50
    call differs
    CHECK_EQ "the array comes back", rax, 0
    ret

rounds:
    PARAM rbp, "rounds", 8
    xor ebx, ebx
    test rbp, rbp
    jz .done
.round:
    test ebp, 1
    jz .swap
    HOST2 VMCALL_MIGRATE, r13, r12
    jmp .program
.swap:
    HOST2 VMCALL_SWAP_OUT, r13, r12
.program:
    mov eax, ebp
    and eax, WORK_BYTES / 2 - 1
    mov byte ptr [r13], 0x40
    mov [r13 + WORK + 128 + rax], bpl
    mov byte ptr [r13], 0xFF
    mov cl, [r15 + WORK + 128 + rax]
    and cl, bpl
    mov [r15 + WORK + 128 + rax], cl
    call differs
    or rbx, rax
    dec rbp
    jnz .round
.done:
    CHECK_EQ "nothing is lost, wherever the pages are", rbx, 0
    HOST1 VMCALL_SLOT_DELETE, r14
    CHECK_EQ "the slot goes", rax, 0
    ret

.section data
.align 8
flash_gpa:      .quad SLOT_TEST_GPA
other_gpa:      .quad SLOT_TEST_GPA + 0x400000

.section bss
.align 8
was:            .skip 8
