; mmio: loads and stores of every size to an address without memory reach the device whole and in order
;
; The test device keeps what is stored and tells of the last access. Every form of MOV is tried, aligned
; and not, with sign and zero extension, string instructions, and the open bus, where nobody answers.
;
; vmcalls: mmio_device
.include "runtime.inc"

.equ STORED, 1 << 24

main:
    PASS "the guest runs without the device"
    NEED_HOST "the MMIO test device", .end
    HOST0 VMCALL_MMIO_DEVICE
    mov r13, rax
    HOST_CHECK "the device is there", 0
    test rax, rax
    jz .end
    mov qword ptr [value], 0
    mov rax, 0x8877665544332211
    mov [value], rax
    call stores
    call loads
    call extensions
    call immediates
    call unaligned
    call counted
    call open_bus
.end:
    ret

; CHECK_ACCESS "name", offset | size << 16 | STORED, value: what the device saw last
.macro CHECK_ACCESS name, access, due
    mov eax, [r13 + MMIO_LAST_ACCESS]
    CHECK_EQ \name, rax, \access
    mov rax, [r13 + MMIO_LAST_VALUE]
    mov rcx, \due
    CHECK_EQ \name, rax, rcx
.endm

stores:
    mov rdx, [value]
    mov [r13 + 0x10], dl
    CHECK_ACCESS "store of 1 byte", 0x10 | (1 << 16) | STORED, 0x11
    mov [r13 + 0x12], dx
    CHECK_ACCESS "store of 2 bytes", 0x12 | (2 << 16) | STORED, 0x2211
    mov [r13 + 0x14], edx
    CHECK_ACCESS "store of 4 bytes", 0x14 | (4 << 16) | STORED, 0x44332211
    mov [r13 + 0x18], rdx
    CHECK_ACCESS "store of 8 bytes", 0x18 | (8 << 16) | STORED, 0x8877665544332211
    mov rsi, r13
    mov [rsi + 0x20], dh
    CHECK_ACCESS "store of a high byte", 0x20 | (1 << 16) | STORED, 0x22
    mov r9, rdx
    mov [r13 + 0x21], r9b
    CHECK_ACCESS "store of a new register's byte", 0x21 | (1 << 16) | STORED, 0x11
    ret

loads:
    xor eax, eax
    mov al, [r13 + 0x18]
    CHECK_EQ "load of 1 byte", rax, 0x11
    xor eax, eax
    mov ax, [r13 + 0x18]
    CHECK_EQ "load of 2 bytes", rax, 0x2211
    mov rax, -1
    mov eax, [r13 + 0x18]
    CHECK_EQ "load of 4 bytes clears the upper half", rax, 0x44332211
    mov rax, [r13 + 0x18]
    CHECK_EQ "load of 8 bytes", rax, qword ptr [value]
    CHECK_ACCESS "a load as the device sees it", 0x18 | (8 << 16), 0x8877665544332211
    mov r15, [r13 + 0x18]
    CHECK_EQ "load into a new register", r15, qword ptr [value]
    mov rcx, -1
    mov cl, [r13 + 0x19]
    CHECK_EQ "load of 1 byte keeps the rest", rcx, -0xde
    mov rcx, -1
    mov rsi, r13
    mov ch, [rsi + 0x19]
    CHECK_EQ "load into a high byte keeps the rest", rcx, -0xdd01
    ret

extensions:
    movzx eax, byte ptr [r13 + 0x1f]
    CHECK_EQ "movzx of a byte", rax, 0x88
    movzx eax, word ptr [r13 + 0x1e]
    CHECK_EQ "movzx of a word", rax, 0x8877
    movsx rax, byte ptr [r13 + 0x1f]
    CHECK_EQ "movsx of a byte", rax, -0x78
    movsx rax, word ptr [r13 + 0x1e]
    CHECK_EQ "movsx of a word", rax, -0x7789
    movsxd rax, dword ptr [r13 + 0x1c]
    CHECK_EQ "movsxd of a dword", rax, -0x778899ab
    ret

immediates:
    mov byte ptr [r13 + 0x30], 0x5a
    CHECK_ACCESS "store of an immediate byte", 0x30 | (1 << 16) | STORED, 0x5a
    mov word ptr [r13 + 0x30], 0x1234
    CHECK_ACCESS "store of an immediate word", 0x30 | (2 << 16) | STORED, 0x1234
    mov dword ptr [r13 + 0x30], 0x12345678
    CHECK_ACCESS "store of an immediate dword", 0x30 | (4 << 16) | STORED, 0x12345678
    mov qword ptr [r13 + 0x30], -2
    CHECK_ACCESS "store of a sign-extended immediate", 0x30 | (8 << 16) | STORED, 0xfffffffffffffffe
    mov ebx, 2
    lea rdi, [r13 + 0x100]
    mov dword ptr [rdi + rbx*8 - 4], 0x77
    CHECK_ACCESS "base, index, scale and displacement", 0x10c | (4 << 16) | STORED, 0x77
    ret

unaligned:
    mov rdx, [value]
    mov [r13 + 0x41], rdx
    mov rax, [r13 + 0x41]
    CHECK_EQ "8 bytes at an odd address", rax, qword ptr [value]
    mov eax, [r13 + 0x43]
    CHECK_EQ "4 bytes at an odd address", rax, 0x66554433
    movzx eax, word ptr [r13 + 0x47]
    CHECK_EQ "2 bytes at an odd address", rax, 0x8877
    ret

counted:
    mov dword ptr [r13 + MMIO_COUNT], 0
    mov ecx, 10
.again:
    mov [r13 + 0x50], ecx
    mov eax, [r13 + 0x50]
    dec ecx
    jnz .again
    mov ecx, [r13 + MMIO_COUNT]
    CHECK_EQ "ten stores and ten loads are twenty accesses", rcx, 20
    CHECK_EQ "the last load has the last store", rax, 1
    ret

open_bus:
    mov rdi, [open_bus_gpa]
    mov rax, [rdi]
    CHECK_EQ "open bus: 8 bytes", rax, -1
    mov eax, [rdi + 4]
    not eax
    CHECK_EQ "open bus: 4 bytes", rax, 0
    movzx eax, word ptr [rdi]
    CHECK_EQ "open bus: 2 bytes", rax, 0xffff
    movzx eax, byte ptr [rdi]
    CHECK_EQ "open bus: 1 byte", rax, 0xff
    mov [rdi], rax
    mov rax, [rdi]
    CHECK_EQ "open bus keeps nothing", rax, -1
    ret

.section rodata
.align 8
open_bus_gpa: .quad OPEN_BUS_GPA
.section bss
.align 8
value: .skip 8
