; pfnmap: a device's memory that is mapped raw is the guest's until the device is reset, and zeros then
;
; No struct page counts who uses such frames: KVM follows the VMM's entry and takes no reference. CPU 0 has the
; device reset again and again, while the other CPUs store to its memory and look what is there.
;
; param pages=4     of the device's memory, at most 64
; param rounds=20   resets
; vmcalls: cpu_count start_cpu pfnmap_create pfnmap_revoke
.include "runtime.inc"
.include "cpus.inc"

.equ BAR_GPA, 0xE0000000
.equ BAR_VA, TEST_VA + 0x100000000
.equ PATIENCE, 1 << 20
.equ KEY, 0x5EED

main:
    PARAM rax, "pages", 4
    AT_LEAST rax, 1
    cmp rax, 64
    jbe .pages
    mov eax, 64
.pages:
    mov [pages], rax
    PARAM r15, "rounds", 20
    AT_LEAST r15, 1
    PASS "the guest runs without the device"
    NEED_HOST "a device", .end
    mov rcx, BAR_GPA
    HOST2 VMCALL_PFNMAP_CREATE, rcx, qword ptr [pages]
    mov [slot], rax
    mov rcx, rax
    shr rcx, 63
    CHECK_EQ "the device's memory is there", rcx, 0
    call map_bar
    HOST0 VMCALL_CPU_COUNT
    mov r14, rax
    call start_cpus
    xor ebx, ebx
    xor ebp, ebp
.round:
    mov rdi, BAR_VA
    mov rcx, [pages]
.page:
    call fresh
    mov qword ptr [rdi], KEY
    cmp qword ptr [rdi], KEY
    je .stored
    inc ebx
.stored:
    add rdi, PAGE_SIZE
    dec rcx
    jnz .page
    HOST1 VMCALL_PFNMAP_REVOKE, qword ptr [slot]
    or rbp, rax
    dec r15
    jnz .round
    CHECK_EQ "each reset", rbp, 0
    CHECK_EQ "zeros after it, and then what was stored", rbx, 0
    mov byte ptr [enough], 1
    dec r14
    mov r8d, PATIENCE
.wait:
    cmp [done], r14
    jae .all
    call let_run
    dec r8d
    jnz .wait
.all:
    CHECK_EQ "every CPU finished", qword ptr [done], r14
    CHECK_EQ "and found no word that nobody stored", qword ptr [wrong], 0
.end:
    ret

; Adds to ebx if the first word of the page at rdi is not 0, as after a reset.
fresh:
    cmp qword ptr [rdi], 0
    je .zero
    inc ebx
.zero:
    ret

; The device's memory at BAR_VA.
map_bar:
    mov rdi, BAR_VA
    mov esi, 1
    mov edx, pml4
    call walk_create
    mov rdx, BAR_GPA + PTE_P + PTE_W
    mov rcx, [pages]
.entry:
    mov [rax], rdx
    add rax, 8
    add rdx, PAGE_SIZE
    dec rcx
    jnz .entry
    ret

; An instruction that exits, so that a machine may let another CPU run.    changes rax, rcx, rdx
let_run:
    push rbx
    xor eax, eax
    cpuid
    pop rbx
    ret

; Another CPU, number rsi: it has a word of its own in each page.
work:
    shl rsi, 3
.again:
    mov rdi, BAR_VA
    mov r8, [pages]
.page:
    mov rax, [rdi + rsi]
    test rax, rax
    jz .known
    cmp rax, rsi
    je .known
    lock inc qword ptr [wrong]
.known:
    mov [rdi + rsi], rsi
    add rdi, PAGE_SIZE
    dec r8
    jnz .page
    call let_run
    cmp byte ptr [enough], 0
    je .again
    lock inc qword ptr [done]
    ret

.section bss
.align 8
pages:          .skip 8
slot:           .skip 8
done:           .skip 8
wrong:          .skip 8
enough:         .skip 8
