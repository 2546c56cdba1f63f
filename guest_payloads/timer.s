; timer: the PIT interrupts through the PIC, at HLT, in a loop, in ring 3, and not when it may not
;
; IRQ0 is counted. It must wake HLT, break into a loop in ring 0 and in ring 3, wait while RFLAGS.IF is
; clear or the PIC masks it, and come once for a one-shot.
;
; param hz=500      rate of the periodic timer
; param ticks=10    interrupts to wait for
.include "runtime.inc"

.equ IRQ_BASE, 0x20
.equ PIC_EOI, 0x20
.equ PIC_READ_IRR, 0x0A
.equ PIC_READ_ISR, 0x0B
.equ PIT_RATE, 0x34                      ; channel 0, low then high byte, mode 2
.equ PIT_ONE_SHOT, 0x30                  ; mode 0
.equ PIT_LATCH, 0x00
.equ PATIENCE, 1 << 28

main:
    PARAM rax, "hz", 500
    AT_LEAST rax, 20
    mov rcx, rax
    mov eax, PIT_HZ
    xor edx, edx
    div rcx
    mov [divisor], rax
    PARAM r12, "ticks", 10
    AT_LEAST r12, 1
    mov qword ptr [IRQ_BASE * 8 + trap_handlers], irq0
    call pic_init
    call pit_periodic
    call wake_hlt
    call counter_runs
    call break_loop
    call held_back
    call masked
    call ring3
    call one_shot
    mov al, 0xFF
    out PIC1_DATA, al
    ret

irq0:
    inc qword ptr [ticks]
    mov al, PIC_READ_ISR
    out PIC1_COMMAND, al
    in al, PIC1_COMMAND
    mov [in_service], al
    mov al, PIC_EOI
    out PIC1_COMMAND, al
    mov rax, [rdi + FRAME_CS]
    mov [interrupted_cs], rax
    cmp eax, USER_CODE
    jne .end
    mov rax, USER_TEXT_VA + user_done - user_text
    mov [rdi + FRAME_RIP], rax
    mov eax, 0x3333
    mov [rdi + FRAME_RAX], rax
    and qword ptr [rdi + FRAME_RFLAGS], -513
.end:
    ret

pic_init:
    mov al, 0x11
    out PIC1_COMMAND, al
    out PIC2_COMMAND, al
    mov al, IRQ_BASE
    out PIC1_DATA, al
    mov al, IRQ_BASE + 8
    out PIC2_DATA, al
    mov al, 4
    out PIC1_DATA, al
    mov al, 2
    out PIC2_DATA, al
    mov al, 1
    out PIC1_DATA, al
    out PIC2_DATA, al
    mov al, 0xFF
    out PIC2_DATA, al
    mov al, 0xFE
    out PIC1_DATA, al
    in al, PIC1_DATA
    movzx eax, al
    CHECK_EQ "the PIC's mask reads back", rax, 0xFE
    ret

pit_periodic:
    mov al, PIT_RATE
pit_program:
    out PIT_COMMAND, al
    mov eax, [divisor]
    out PIT_CHANNEL0, al
    mov al, ah
    out PIT_CHANNEL0, al
    ret

; rax = the counter now.
pit_count:
    mov al, PIT_LATCH
    out PIT_COMMAND, al
    in al, PIT_CHANNEL0
    movzx ecx, al
    in al, PIT_CHANNEL0
    movzx eax, al
    shl eax, 8
    or eax, ecx
    ret

; Lets rdi PIT clocks go by, at least, by watching the counter.
pit_wait:
    push rbx
    call pit_count
    mov rbx, rax
.again:
    call pit_count
    mov rcx, rbx
    sub rcx, rax                         ; it counts down
    jns .forward
    add rcx, [divisor]
    jns .forward
    add rcx, 0x10000
.forward:
    mov rbx, rax
    sub rdi, rcx
    jg .again
    pop rbx
    ret

wake_hlt:
    mov qword ptr [ticks], 0
    xor ebx, ebx                         ; HLTs that ended without a tick
.again:
    mov rcx, [ticks]
    sti
    hlt
    cli
    cmp rcx, [ticks]
    jne .ticked
    inc rbx
.ticked:
    cmp [ticks], r12
    jb .again
    CHECK_EQ "HLT ends with a tick", rbx, 0
    movzx ecx, byte ptr [in_service]
    and ecx, 1
    CHECK_EQ "IRQ0 was in service in its handler", rcx, 1
    CHECK_EQ "it interrupted ring 0", qword ptr [interrupted_cs], KERNEL_CODE
    ret

counter_runs:
    xor ebx, ebx
    mov ebp, 1000
.again:
    call pit_count
    cmp rax, [divisor]
    jbe .in_range
    inc ebx
.in_range:
    dec ebp
    jnz .again
    CHECK_EQ "the counter stays within its divisor", rbx, 0
    mov rdi, [divisor]
    shl rdi, 1
    call pit_wait
    PASS "the counter counts"
    ret

break_loop:
    mov rbx, [ticks]
    add rbx, r12
    mov ecx, PATIENCE
    sti
.again:
    cmp [ticks], rbx
    jae .enough
    pause
    dec ecx
    jnz .again
.enough:
    cli
    mov rax, [ticks]
    sub rax, rbx
    sar rax, 63
    CHECK_EQ "ticks break into a loop", rax, 0
    ret

held_back:
    mov rbx, [ticks]
    mov rdi, [divisor]
    shl rdi, 2
    call pit_wait
    mov rcx, [ticks]
    sub rcx, rbx
    CHECK_EQ "no tick while IF is clear", rcx, 0
    mov al, PIC_READ_IRR
    out PIC1_COMMAND, al
    in al, PIC1_COMMAND
    and eax, 1
    CHECK_EQ "it waits in the PIC's IRR", rax, 1
    sti
    nop
    nop
    cli
    mov rcx, [ticks]
    sub rcx, rbx
    CHECK_EQ "and comes once when IF is set", rcx, 1
    ret

masked:
    mov al, 0xFF
    out PIC1_DATA, al
    mov rbx, [ticks]
    sti
    mov rdi, [divisor]
    shl rdi, 2
    call pit_wait
    mov rcx, [ticks]
    sub rcx, rbx
    CHECK_EQ "no tick while the PIC masks it", rcx, 0
    mov al, 0xFE
    out PIC1_DATA, al
    mov ecx, PATIENCE
.again:
    cmp [ticks], rbx
    jne .came
    pause
    dec ecx
    jnz .again
.came:
    cli
    mov rcx, [ticks]
    cmp rcx, rbx
    seta cl
    movzx ecx, cl
    CHECK_EQ "ticks come when it is unmasked", rcx, 1
    ret

ring3:
    mov esi, user_text
    call map_user
    mov rdi, USER_TEXT_VA
    mov rsi, USER_STACK_VA + PAGE_SIZE
    mov ecx, 0x202
    call run_user
    CHECK_EQ "a tick breaks into an endless loop of ring 3", rax, 0x3333
    CHECK_EQ "the frame says ring 3", qword ptr [interrupted_cs], USER_CODE
    ret

one_shot:
    mov al, PIT_ONE_SHOT
    call pit_program
    sti
    mov rdi, [divisor]                   ; periodic ticks that waited, and this first one, come here
    shl rdi, 2
    call pit_wait
    cli
    mov rbx, [ticks]
    mov al, PIT_ONE_SHOT
    call pit_program
    mov ecx, PATIENCE
    sti
.again:
    cmp [ticks], rbx
    jne .came
    pause
    dec ecx
    jnz .again
.came:
    mov rdi, [divisor]
    shl rdi, 2
    call pit_wait
    cli
    mov rcx, [ticks]
    sub rcx, rbx
    CHECK_EQ "a one-shot comes once", rcx, 1
    ret

.align 4096
user_text:
    pause
    jmp user_text
user_done:
    int VECTOR_USER_EXIT
.align 4096

.section bss
.align 8
ticks:          .skip 8
divisor:        .skip 8
interrupted_cs: .skip 8
in_service:     .skip 8
