; prefault: the guest finds its memory mapped before it touched it
;
; KVM_PRE_FAULT_MEMORY maps a range as reads would. The guest's loads then take no fault; what lies beside the
; range is not mapped, and the first store to a page that nobody had written finds its own memory.
;
; param pages=16    pages mapped ahead, at least 2
; vmcalls: prefault map_level host_write swap_out
.include "runtime.inc"

main:
    PARAM r12, "pages", 16
    AT_LEAST r12, 2
    lea rdi, [r12 + 1]
    call pages_alloc
    mov r13, rax
    mov r14, r12
    shl r14, 12                          ; the range in bytes; behind it one page more
    PASS "the guest runs without mapping ahead"
    NEED_HOST "mapping ahead", .end
    HOST3 VMCALL_HOST_WRITE, r13, 0x77, 4
    HOST2 VMCALL_PREFAULT, r13, r12
    HOST_CHECK "map the range", r12
    test rax, rax
    jz .end
    HOST1 VMCALL_MAP_LEVEL, r13
    test rax, rax
    setne al
    movzx eax, al
    CHECK_EQ "the first page is mapped", rax, 1
    lea rcx, [r13 + r14 - 4096]
    HOST1 VMCALL_MAP_LEVEL, rcx
    test rax, rax
    setne al
    movzx eax, al
    CHECK_EQ "so is the last", rax, 1
    lea rcx, [r13 + r14]
    HOST1 VMCALL_MAP_LEVEL, rcx
    CHECK_EQ "what lies behind is not", rax, 0
    mov eax, [r13]
    CHECK_EQ "it has what the VMM stored", rax, 0x77
    mov qword ptr [r13 + 4096], r13
    mov rax, [r13 + 4096]
    CHECK_EQ "a store to a page of zeros", rax, r13
    HOST2 VMCALL_SWAP_OUT, r13, r12
    HOST2 VMCALL_PREFAULT, r13, r12
    CHECK_EQ "what is on disk is read in", rax, r12
    mov rax, [r13 + 4096]
    CHECK_EQ "with its bytes", rax, r13
    HOST2 VMCALL_PREFAULT, qword ptr [nowhere], 1
    CHECK_EQ "where no memory is nothing is mapped", rax, -EFAULT
    HOST2 VMCALL_PREFAULT, r13, 0
    CHECK_EQ "no pages", rax, -EINVAL
.end:
    ret

.section rodata
.align 8
nowhere:    .quad SLOT_TEST_GPA
