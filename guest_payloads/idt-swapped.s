; idt-swapped: exceptions are delivered although IDT, GDT, TSS, stacks and page tables are on disk
;
; The host swaps out what the CPU itself reads and writes while it delivers an exception. The delivery
; is cut off by EPT violations, the host brings the page back, and the exception arrives as if nothing
; had been: right vector, error code, CR2, stack.
;
; param rounds=2    how often everything is swapped out
; vmcalls: swap_out
.include "runtime.inc"

.equ ABSENT_VA, TEST_VA + 0x123456

main:
    PARAM r14, "rounds", 2
    AT_LEAST r14, 1
    mov esi, user_text
    call map_user
    mov byte ptr [idt + 6 * 16 + 4], 1   ; #UD runs on IST1
    mov qword ptr [3 * 8 + trap_handlers], breakpoint
    mov qword ptr [VECTOR_SYSCALL * 8 + trap_handlers], int80
.round:
    call idt_out
    call gdt_out
    call tss_out
    call stacks_out
    call tables_out
    call user_out
    call image_out
    dec r14
    jnz .round
    ret

breakpoint:
    inc qword ptr [breakpoints]
    ret

int80:
    inc qword ptr [int80s]
    mov qword ptr [rdi + FRAME_RAX], 0x80
    ret

; Swaps a range out, named for the report.
.macro OUT name, address, pages
    HOST2 VMCALL_SWAP_OUT, \address, \pages
    HOST_CHECK \name, \pages
.endm

idt_out:
    OUT "swap the IDT out", idt, 1
    int3
    CHECK_EQ "int3 through a swapped-out IDT", qword ptr [breakpoints], 1
    mov qword ptr [breakpoints], 0
    HOST2 VMCALL_SWAP_OUT, idt, 1
    mov rdi, ABSENT_VA
    TRY .trapped
    mov byte ptr [rdi], 1
.trapped:
    ENDTRY
    CHECK_EQ "#PF through a swapped-out IDT", qword ptr [caught_vector], 14
    CHECK_EQ "its error code", qword ptr [caught_error], 2
    CHECK_EQ "its CR2", qword ptr [caught_cr2], rdi
    ret

gdt_out:
    OUT "swap the GDT out", gdt, 1
    mov eax, KERNEL_DATA
    mov es, ax
    int3                                 ; reads the GDT for the gate's CS
    CHECK_EQ "int3 through a swapped-out GDT", qword ptr [breakpoints], 1
    mov qword ptr [breakpoints], 0
    HOST2 VMCALL_SWAP_OUT, gdt, 1
    mov eax, 0x1000
    TRY .trapped
    mov es, ax                           ; behind the GDT's limit
.trapped:
    ENDTRY
    CHECK_EQ "#GP for a selector behind the GDT", qword ptr [caught_vector], 13
    CHECK_EQ "its error code is the selector", qword ptr [caught_error], 0x1000
    ret

tss_out:
    mov rbx, tss_area
    and rbx, -PAGE_SIZE
    OUT "swap the TSS out", rbx, 1
    TRY .trapped
    ud2
.trapped:
    ENDTRY
    CHECK_EQ "#UD on IST1 of a swapped-out TSS", qword ptr [caught_vector], 6
    HOST2 VMCALL_SWAP_OUT, rbx, 1
    call run_int80
    CHECK_EQ "ring 3 enters ring 0 by a swapped-out TSS", rax, 0x80
    ret

stacks_out:
    OUT "swap the fault stack out", fault_stacks, 1
    TRY .trapped
    ud2
.trapped:
    ENDTRY
    CHECK_EQ "#UD on a swapped-out stack", qword ptr [caught_vector], 6
    OUT "swap the ring 0 stack out", ring0_stacks, 1
    call run_int80
    CHECK_EQ "ring 3 enters ring 0 on a swapped-out stack", rax, 0x80
    HOST2 VMCALL_SWAP_OUT, boot_stack, 4
    int3
    CHECK_EQ "int3 on the running stack, swapped out", qword ptr [breakpoints], 1
    mov qword ptr [breakpoints], 0
    ret

tables_out:
    OUT "swap the page tables out", pml4, 7
    mov rax, cr3
    mov cr3, rax
    TRY .trapped
    ud2
.trapped:
    ENDTRY
    CHECK_EQ "#UD through swapped-out page tables", qword ptr [caught_vector], 6
    HOST2 VMCALL_SWAP_OUT, pml4, 7
    call run_int80
    CHECK_EQ "ring 3 through swapped-out page tables", rax, 0x80
    ret

user_out:
    HOST2 VMCALL_SWAP_OUT, idt, 2        ; IDT and TSS
    HOST2 VMCALL_SWAP_OUT, gdt, 1
    HOST2 VMCALL_SWAP_OUT, ring0_stacks, 1
    HOST2 VMCALL_SWAP_OUT, pml4, 7
    mov rdi, USER_TEXT_VA + user_load - user_text
    mov rsi, USER_STACK_VA + PAGE_SIZE
    mov rdx, ABSENT_VA
    mov ecx, 2
    TRY .trapped
    call run_user
.trapped:
    ENDTRY
    CHECK_EQ "#PF of ring 3 with everything out", qword ptr [caught_vector], 14
    CHECK_EQ "its error code says user", qword ptr [caught_error], 4
    mov rcx, ABSENT_VA
    CHECK_EQ "its CR2 is the program's", qword ptr [caught_cr2], rcx
    ret

image_out:
    mov ecx, __image_end - IMAGE_BASE + PAGE_SIZE - 1
    shr ecx, 12
    HOST2 VMCALL_SWAP_OUT, IMAGE_BASE, rcx
    HOST_CHECK "swap the whole image out, running code too", rcx
    int3
    CHECK_EQ "int3 with the whole image out", qword ptr [breakpoints], 1
    mov qword ptr [breakpoints], 0
    HOST2 VMCALL_SWAP_OUT, IMAGE_BASE, rcx
    call run_int80
    CHECK_EQ "ring 3 and back with the whole image out", rax, 0x80
    ret

run_int80:
    mov rdi, USER_TEXT_VA
    mov rsi, USER_STACK_VA + PAGE_SIZE
    mov ecx, 2
    jmp run_user

.align 4096
user_text:
    int VECTOR_SYSCALL
    int VECTOR_USER_EXIT
user_load:
    mov al, [rdi]
    int VECTOR_USER_EXIT
.align 4096

.section bss
.align 8
breakpoints:    .skip 8
int80s:         .skip 8
