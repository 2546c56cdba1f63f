; syscalls: into ring 3 and back by SYSCALL/SYSRET and by INT 0x80, and what ring 3 may not do
;
; A program in ring 3 makes system calls both ways; the kernel checks what the CPU saved (RCX, R11,
; FMASK, the frame on TSS.RSP0) and the program checks what came back. Privileged instructions and
; gates that are not for ring 3 must raise their exceptions.
;
; param calls=200   system calls of each kind
.include "runtime.inc"

.equ USER_FLAGS, 2                       ; interrupts stay off: nobody serves them
.equ FLAG_DF, 0x400

main:
    PARAM r12, "calls", 200
    AT_LEAST r12, 1
    mov esi, user_text
    call map_user
    mov qword ptr [VECTOR_SYSCALL * 8 + trap_handlers], int80_handler
    call without_sce
    call setup_syscall
    call syscall_loop
    call int80_loop
    call flags_masked
    call forbidden
    ret

.macro USER entry, argument
    mov rdi, USER_TEXT_VA + \entry - user_text
    mov rsi, USER_STACK_VA + PAGE_SIZE
    mov rdx, \argument
    mov ecx, USER_FLAGS
    call run_user
.endm

without_sce:
    TRY .trapped
    USER user_one_syscall, 0
.trapped:
    ENDTRY
    CHECK_EQ "SYSCALL without EFER.SCE is #UD", qword ptr [caught_vector], 6
    CHECK_EQ "in ring 3", qword ptr [caught_cs], USER_CODE
    ret

setup_syscall:
    mov ecx, MSR_EFER
    rdmsr
    or eax, EFER_SCE
    wrmsr
    mov ecx, MSR_STAR
    xor eax, eax
    mov edx, (USER_BASE << 16) | KERNEL_CODE
    wrmsr
    mov ecx, MSR_LSTAR
    mov eax, syscall_entry
    xor edx, edx
    wrmsr
    mov ecx, MSR_FMASK
    mov eax, FLAG_DF | 0x200
    xor edx, edx
    wrmsr
    ret

; The kernel's side of SYSCALL: rax = 3 * rdi + 1; notes what the CPU left.
syscall_entry:
    mov [user_rsp], rsp
    mov rsp, kernel_stack_end
    mov [seen_rcx], rcx
    mov [seen_r11], r11
    pushfq
    pop qword ptr [seen_flags]
    mov eax, cs
    mov [seen_cs], rax
    mov eax, ss
    mov [seen_ss], rax
    inc qword ptr [syscalls_seen]
    lea rax, [rdi + rdi*2 + 1]
    mov rsp, [user_rsp]
    sysret

int80_handler:
    inc qword ptr [int80_seen]
    mov rax, [rdi + FRAME_RSP]
    mov [seen_rsp], rax
    mov rax, [rdi + FRAME_CS]
    mov [seen_cs], rax
    mov rax, [rdi + FRAME_SS]
    mov [seen_ss], rax
    mov [seen_frame], rdi
    mov rax, [rdi + FRAME_RDI]
    lea rax, [rax + rax*4 + 2]
    mov [rdi + FRAME_RAX], rax
    ret

syscall_loop:
    USER user_syscalls, r12
    CHECK_EQ "SYSCALL: ring 3 counts its right answers", rax, r12
    CHECK_EQ "SYSCALL: the kernel counts the calls", qword ptr [syscalls_seen], r12
    mov rcx, USER_TEXT_VA + user_after_syscall - user_text
    CHECK_EQ "RCX is the return address", qword ptr [seen_rcx], rcx
    CHECK_EQ "CS is STAR's", qword ptr [seen_cs], KERNEL_CODE
    CHECK_EQ "SS is STAR's + 8", qword ptr [seen_ss], KERNEL_DATA
    ret

int80_loop:
    USER user_int80, r12
    CHECK_EQ "INT 0x80: ring 3 counts its right answers", rax, r12
    CHECK_EQ "INT 0x80: the kernel counts the calls", qword ptr [int80_seen], r12
    CHECK_EQ "the frame has ring 3's CS", qword ptr [seen_cs], USER_CODE
    CHECK_EQ "and SS", qword ptr [seen_ss], USER_DATA
    mov rcx, USER_STACK_VA + PAGE_SIZE
    CHECK_EQ "and RSP", qword ptr [seen_rsp], rcx
    mov rcx, [seen_frame]
    add rcx, FRAME_SS + 8
    CHECK_EQ "the frame is on TSS.RSP0", rcx, ring0_stacks + STACK_SIZE
    ret

flags_masked:
    USER user_flags, 0
    mov rcx, [seen_flags]
    and ecx, FLAG_DF
    CHECK_EQ "FMASK clears DF in the kernel", rcx, 0
    mov rcx, [seen_r11]
    and ecx, FLAG_DF
    CHECK_EQ "R11 has ring 3's DF", rcx, FLAG_DF
    and eax, FLAG_DF
    CHECK_EQ "SYSRET gives DF back", rax, FLAG_DF
    ret

; USER_TRAP "name", entry, at, vector, error: entry runs in ring 3, the instruction at `at` traps
.macro USER_TRAP name, entry, at, vector, error
    TRY __trapped_\@
    USER \entry, HEAP_BASE
__trapped_\@:
    ENDTRY
    CHECK_EQ \name, qword ptr [caught_vector], \vector
    CHECK_EQ "its error code", qword ptr [caught_error], \error
    mov rcx, USER_TEXT_VA + \at - user_text
    CHECK_EQ "its RIP", qword ptr [caught_rip], rcx
.endm

forbidden:
    USER_TRAP "CLI in ring 3 is #GP", user_cli, user_cli, 13, 0
    USER_TRAP "HLT in ring 3 is #GP", user_hlt, user_hlt, 13, 0
    USER_TRAP "MOV to CR3 in ring 3 is #GP", user_cr3, user_cr3, 13, 0
    USER_TRAP "RDMSR in ring 3 is #GP", user_rdmsr, user_rdmsr, 13, 0
    USER_TRAP "OUT in ring 3 is #GP", user_out, user_out, 13, 0
    call forbidden_gate
    USER_TRAP "the kernel's data selector from ring 3 is #GP", user_segment, user_segment_load, 13, KERNEL_DATA
    USER_TRAP "the kernel's memory from ring 3 is #PF", user_kernel_memory, user_kernel_memory, 14, 5
    CHECK_EQ "its CR2", qword ptr [caught_cr2], HEAP_BASE
    USER_TRAP "UD2 in ring 3 is #UD", user_ud2, user_ud2, 6, 0
    ret

; QEMU's TCG puts the vector in the error code's wrong bits in 64-bit mode; that is known and not ours.
forbidden_gate:
    TRY .trapped
    USER user_int81, 0
.trapped:
    ENDTRY
    CHECK_EQ "a DPL 0 gate from ring 3 is #GP", qword ptr [caught_vector], 13
    cmp byte ptr [have_host], 0
    jne .exact
    cmp qword ptr [caught_error], (0x81 << 4) | 2
    jne .exact
    SKIP "its error code names the gate", "this CPU is QEMU's TCG, which shifts the vector by 4"
    ret
.exact:
    CHECK_EQ "its error code names the gate", qword ptr [caught_error], (0x81 << 3) | 2
    ret

; What runs in ring 3, at USER_TEXT_VA: no absolute addresses.
.align 4096
user_text:
user_one_syscall:
    syscall
    int VECTOR_USER_EXIT

; rdi = how many; rax = right answers.
user_syscalls:
    mov r12, rdi
    xor r13d, r13d
.again:
    mov rdi, r12
    xor eax, eax
    syscall
user_after_syscall:
    lea rcx, [r12 + r12*2 + 1]
    cmp rax, rcx
    jne .wrong
    inc r13
.wrong:
    dec r12
    jnz user_syscalls.again
    mov rax, r13
    int VECTOR_USER_EXIT

user_int80:
    mov r12, rdi
    xor r13d, r13d
.again:
    mov rdi, r12
    int VECTOR_SYSCALL
    lea rcx, [r12 + r12*4 + 2]
    cmp rax, rcx
    jne .wrong
    inc r13
.wrong:
    dec r12
    jnz .again
    mov rax, r13
    int VECTOR_USER_EXIT

; rax = RFLAGS after a system call that was made with DF set.
user_flags:
    std
    syscall
    pushfq
    pop rax
    cld
    int VECTOR_USER_EXIT

user_cli:
    cli
user_hlt:
    hlt
user_cr3:
    mov cr3, rax
user_rdmsr:
    rdmsr
user_out:
    out EXIT_PORT, al
user_int81:
    int 0x81
user_segment:
    mov edx, KERNEL_DATA
user_segment_load:
    mov ds, dx
user_kernel_memory:
    mov al, [rdi]
user_ud2:
    ud2
.align 4096

.section bss
.align 16
kernel_stack:   .skip 1024
kernel_stack_end:
user_rsp:       .skip 8
seen_rcx:       .skip 8
seen_r11:       .skip 8
seen_flags:     .skip 8
seen_cs:        .skip 8
seen_ss:        .skip 8
seen_rsp:       .skip 8
seen_frame:     .skip 8
syscalls_seen:  .skip 8
int80_seen:     .skip 8
