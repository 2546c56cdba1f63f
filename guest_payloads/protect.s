; protect: the VMM takes rights of its mapping away; a forbidden access leaves the guest, is granted, repeated
;
; The VMM makes pages read-only or inaccessible with mprotect. What is still allowed must go on without
; a memory fault; what is not leaves KVM_RUN, the VMM gives the rights back and the guest's instruction
; is repeated as if nothing had been.
;
; param pages=8     pages protected, at least 2
; vmcalls: protect protect_faults
.include "runtime.inc"

main:
    PARAM r12, "pages", 8
    AT_LEAST r12, 2
    mov rdi, r12
    call pages_alloc
    mov r13, rax
    mov rdi, r13
    mov esi, 11
    mov rdx, r12
    shl rdx, 9
    call fill_words
    call check_all
    CHECK_EQ "the pages hold their bytes", rax, 0
    NEED_HOST "mprotect", .end
    HOST3 VMCALL_PROTECT, r13, r12, PROT_READ
    HOST_CHECK "read-only", 0
    test rax, rax
    jz .end
    call read_only
    call inaccessible
    call code_inaccessible
    HOST3 VMCALL_PROTECT, r13, r12, 64
    CHECK_EQ "unknown protection bits are refused", rax, -EINVAL
.end:
    ret

read_only:
    call check_all
    CHECK_EQ "reads of read-only memory", rax, 0
    HOST0 VMCALL_PROTECT_FAULTS
    CHECK_EQ "do not fault", rax, 0
    lock inc qword ptr [r13 + 8]
    HOST0 VMCALL_PROTECT_FAULTS
    CHECK_EQ "a read-modify-write faults once", rax, 1
    lock dec qword ptr [r13 + 8]
    call check_all
    CHECK_EQ "and is done once", rax, 0
    HOST0 VMCALL_PROTECT_FAULTS
    CHECK_EQ "the rights are back", rax, 1
    HOST3 VMCALL_PROTECT, r13, r12, PROT_READ
    lea rdi, [r13 + 4092]                ; a store across two read-only pages
    mov rax, [rdi]
    mov [rdi], rax
    HOST0 VMCALL_PROTECT_FAULTS
    CHECK_EQ "a store across a page border faults once", rax, 1
    ret

inaccessible:
    HOST3 VMCALL_PROTECT, r13, r12, 0
    CHECK_EQ "PROT_NONE", rax, 0
    mov rbx, [r13 + 4096]
    HOST0 VMCALL_PROTECT_FAULTS
    CHECK_EQ "a load from inaccessible memory faults once", rax, 1
    call check_all
    CHECK_EQ "its bytes were kept", rax, 0
    CHECK_EQ "and the load had them", rbx, qword ptr [r13 + 4096]
    HOST3 VMCALL_PROTECT, r13, r12, PROT_READ | PROT_WRITE
    mov [r13 + 4096], rbx
    HOST0 VMCALL_PROTECT_FAULTS
    CHECK_EQ "no fault where everything is allowed", rax, 0
    ret

code_inaccessible:
    HOST3 VMCALL_PROTECT, code_page, 1, 0
    call code_page
    CHECK_EQ "code runs when its page is given back", rcx, 0x77
    HOST0 VMCALL_PROTECT_FAULTS
    CHECK_EQ "a fetch from inaccessible memory faults once", rax, 1
    HOST3 VMCALL_PROTECT, code_page, 1, PROT_READ
    call code_page
    HOST0 VMCALL_PROTECT_FAULTS
    CHECK_EQ "a fetch needs no more than reading", rax, 0
    HOST3 VMCALL_PROTECT, code_page, 1, PROT_READ | PROT_WRITE | PROT_EXEC
    ret

check_all:
    mov rdi, r13
    mov esi, 11
    mov rdx, r12
    shl rdx, 9
    jmp check_words

.align 4096
code_page:
    mov ecx, 0x77
    ret
.align 4096
