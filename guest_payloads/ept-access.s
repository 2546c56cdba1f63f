; ept-access: every combination of R, W and X in an EPT entry gives the exit that the SDM says, and no other
;
; The host gives one page's EPT entry each of the eight combinations; the guest reads, writes, fetches and
; reads-modifies-writes. The page is the data page or one of the four guest tables above it; EPT's own
; accessed and dirty flags are off and on; the guest's A and D bits are clear or set already. Which exit
; must come (reason, qualification, gpa, gva), or none, is computed here from SDM vol. 3C, 29.3.3 and
; table 28-7, and compared with what the CPU reported.
;
; vmcalls: ept_set ept_restore ept_ad last_exit
.include "runtime.inc"

.equ DATA_VA, TEST_VA + 0x40302000       ; index 1 of the PML4 and PDPT, 1 of the PD, 258 of the PT
.equ TARGET_VA, DATA_VA + 0x120
.equ TARGET_WORD, 0xC3C3C3C3             ; RET

.equ ACCESS_READ, 0
.equ ACCESS_WRITE, 1
.equ ACCESS_FETCH, 2
.equ ACCESS_RMW, 3
.equ DATA, 0                             ; targets: the level whose table it is
.equ PML4, 4

.equ EPT_R, 1
.equ EPT_W, 2
.equ EPT_X, 4
.equ REASON_VIOLATION, 48
.equ REASON_MISCONFIG, 49
.equ QUAL_READ, 1
.equ QUAL_WRITE, 2
.equ QUAL_FETCH, 4
.equ QUAL_ENTRY_SHIFT, 3
.equ QUAL_GVA_VALID, 1 << 7
.equ QUAL_TRANSLATED, 1 << 8
.equ QUAL_DEFINED, 0x1BF

main:
    call make_tables
    call plain_accesses
    NEED_HOST "EPT entries", .end
    HOST2 VMCALL_EPT_SET, qword ptr [targets], 7
    HOST_CHECK "arm an EPT entry", 0
    test rax, rax
    jz .end
    HOST2 VMCALL_EPT_SET, qword ptr [targets], 8
    CHECK_EQ "there are eight combinations", rax, -EINVAL
    HOST1 VMCALL_EPT_AD, 0
    mov [ad_before], rax
    xor r13d, r13d
.ad:
    HOST1 VMCALL_EPT_AD, r13
    xor r14d, r14d
.clear:
    xor r12d, r12d
.target:
    call one_target
    inc r12d
    cmp r12d, PML4
    jbe .target
    inc r14d
    cmp r14d, 2
    jb .clear
    inc r13d
    cmp r13d, 2
    jb .ad
    HOST1 VMCALL_EPT_AD, qword ptr [ad_before]
    HOST0 VMCALL_EPT_RESTORE
.end:
    ret

; Tables and a frame of their own for DATA_VA. targets[level] = page, entries[level] = entry's address.
make_tables:
    call page_alloc
    mov [targets + DATA * 8], rax
    mov dword ptr [rax + (TARGET_VA & 0xfff)], TARGET_WORD
    lea rsi, [rax + PTE_P + PTE_W]
    mov rdi, DATA_VA
    call map_page
    mov esi, 1
.level:
    mov rdi, DATA_VA
    mov edx, pml4
    call walk_create
    mov [rsi*8 + entries], rax
    and rax, -PAGE_SIZE
    mov [rsi*8 + targets], rax
    inc esi
    cmp esi, PML4
    jbe .level
    ret

; Without a host: the accesses work and set the guest's bits.
plain_accesses:
    mov r14d, 1
    xor ebp, ebp
    xor r15d, r15d
.access:
    call guest_bits
    call make_access
    call check_guest_bits
    add r15, rax
    inc ebp
    cmp ebp, ACCESS_RMW
    jbe .access
    CHECK_EQ "reads, writes, fetches and both set A and D", r15, 0
    ret

; Eight combinations by four accesses of target r12, EPT A/D r13, guest bits clear r14.
one_target:
    xor r15d, r15d
    xor ebx, ebx
.rwx:
    xor ebp, ebp
.access:
    call one_case
    inc ebp
    cmp ebp, ACCESS_RMW
    jbe .access
    inc ebx
    cmp ebx, 8
    jb .rwx
    call make_name
    mov edi, name
    mov rsi, r15
    xor edx, edx
    jmp test_eq

one_case:
    call expect
    call guest_bits
    HOST2 VMCALL_EPT_SET, qword ptr [r12*8 + targets], rbx
    mov [set_result], rax
    call make_access
    HOST0 VMCALL_EPT_RESTORE
    mov [got_caught], rax
    call fetch_record
    call compare
    ret

; Sets (r14 = 0) or clears (r14 = 1) A and D in the four entries of DATA_VA.
guest_bits:
    mov esi, 1
.level:
    mov rdi, [rsi*8 + entries]
    or qword ptr [rdi], PTE_A
    cmp esi, 1
    jne .not_leaf
    or qword ptr [rdi], PTE_D
.not_leaf:
    test r14d, r14d
    jz .next
    and qword ptr [rdi], ~(PTE_A | PTE_D)
.next:
    inc esi
    cmp esi, PML4
    jbe .level
    mov rax, cr3
    mov cr3, rax
    ret

; Access ebp, which changes nothing in memory.
make_access:
    mov rdi, TARGET_VA
    mov eax, TARGET_WORD
    jmp qword ptr [rbp*8 + accesses]
access_read:
    mov eax, [rdi]
    ret
access_write:
    mov [rdi], eax
    ret
access_fetch:
    call rdi
    ret
access_rmw:
    add dword ptr [rdi], 0
    ret

; want_*: what must come of case r12, r13, r14, rbx, ebp.
expect:
    mov qword ptr [want_reason], 0
    mov qword ptr [compared], QUAL_DEFINED
    mov eax, ebx
    and eax, EPT_R | EPT_W
    cmp eax, EPT_W
    je .misconfig
    xor ecx, ecx                         ; bits 2:0 of the qualification
    test r12d, r12d
    jz .data
    mov edx, QUAL_READ | QUAL_WRITE      ; with EPT A/D the walk's accesses are writes
    test r13d, r13d
    jz .plain_walk
    mov ecx, edx
    test ebx, EPT_W
    jz .violation
    ret
.plain_walk:
    mov ecx, QUAL_READ
    test ebx, EPT_R
    jz .violation
    test r14d, r14d                      ; then A, and D for a write, must be set in the entry
    jz .none
    test ebx, EPT_W
    jnz .none
    mov ecx, QUAL_WRITE
    and qword ptr [compared], ~QUAL_READ ; which of the two a locked update shows is up to the CPU
    jmp .violation
.data:
    mov rax, [rbp*8 + data_needs]
    mov ecx, [rbp*4 + data_access]
    cmp ebp, ACCESS_RMW
    jne .have_access
    and qword ptr [compared], ~QUAL_READ
.have_access:
    mov edx, ebx
    and edx, eax
    cmp edx, eax
    jne .violation
.none:
    ret
.violation:
    mov qword ptr [want_reason], REASON_VIOLATION
    mov eax, ebx
    shl eax, QUAL_ENTRY_SHIFT
    or eax, ecx
    or eax, QUAL_GVA_VALID
    test r12d, r12d
    jnz .walk
    or eax, QUAL_TRANSLATED
.walk:
    and rax, [compared]
    mov [want_qualification], rax
    ret
.misconfig:
    mov qword ptr [want_reason], REASON_MISCONFIG
    ret

; got_*: what the CPU reported.
fetch_record:
    mov qword ptr [got_reason], 0
    cmp qword ptr [got_caught], 0
    je .none
    HOST1 VMCALL_LAST_EXIT, LAST_EXIT_REASON
    mov [got_reason], rax
    HOST1 VMCALL_LAST_EXIT, LAST_EXIT_QUALIFICATION
    and rax, [compared]
    mov [got_qualification], rax
    HOST1 VMCALL_LAST_EXIT, LAST_EXIT_GPA
    mov [got_gpa], rax
    HOST1 VMCALL_LAST_EXIT, LAST_EXIT_GVA
    mov [got_gva], rax
.none:
    ret

; Counts a wrong case in r15 and prints the first one of the target.
compare:
    cmp qword ptr [set_result], 0
    jne .wrong
    mov rax, [want_reason]
    cmp rax, [got_reason]
    jne .wrong
    test rax, rax
    jz .memory
    call due_gpa
    cmp r12d, PML4
    je .pml4
    cmp [got_gpa], rax
    jne .wrong
    cmp qword ptr [want_reason], REASON_VIOLATION
    jne .memory
    mov rax, TARGET_VA
    cmp [got_gva], rax
    jne .wrong
    jmp .qualification
.pml4:                                   ; the code's own walk may be the one that meets it
    xor rax, [got_gpa]
    and rax, -PAGE_SIZE
    jnz .wrong
    cmp qword ptr [want_reason], REASON_VIOLATION
    jne .memory
.qualification:
    mov rax, [want_qualification]
    cmp rax, [got_qualification]
    jne .wrong
.memory:
    call check_guest_bits
    test eax, eax
    jnz .wrong
    ret
.wrong:
    inc r15d
    cmp r15d, 1
    je print_case
    ret

; rax = the gpa that the exit should name.
due_gpa:
    mov rax, [r12*8 + entries]
    test r12d, r12d
    jnz .end
    mov rax, [targets + DATA * 8]
    add rax, TARGET_VA & 0xfff
.end:
    ret

; rax = 0 if the data are unharmed and access ebp has set the guest's A and D bits.
check_guest_bits:
    mov rax, [targets + DATA * 8]
    cmp dword ptr [rax + (TARGET_VA & 0xfff)], TARGET_WORD
    jne .wrong
    mov esi, 1
.level:
    mov rdi, [rsi*8 + entries]
    test qword ptr [rdi], PTE_A
    jz .wrong
    inc esi
    cmp esi, PML4
    jbe .level
    mov rdi, [entries + 8]
    mov rcx, [rdi]
    and ecx, PTE_D
    mov edx, PTE_D
    test r14d, r14d
    jz .compare                          ; it was set before
    test ebp, ACCESS_WRITE               ; write or read-modify-write
    jnz .compare
    xor edx, edx
.compare:
    xor eax, eax
    cmp ecx, edx
    je .end
.wrong:
    mov eax, 1
.end:
    ret

print_case:
    PRINT "rwx "
    PRINT_DEC rbx
    PRINT ", access "
    PRINT_DEC rbp
    PRINT ": got reason "
    PRINT_DEC qword ptr [got_reason]
    PRINT " qualification "
    PRINT_HEX qword ptr [got_qualification]
    PRINT " gpa "
    PRINT_HEX qword ptr [got_gpa]
    PRINT " gva "
    PRINT_HEX qword ptr [got_gva]
    PRINT ", want reason "
    PRINT_DEC qword ptr [want_reason]
    PRINT " qualification "
    PRINT_HEX qword ptr [want_qualification]
    call due_gpa
    PRINT " gpa "
    PRINT_HEX rax
    PRINT "\n"
    ret

; name = the target's name and the two switches.
make_name:
    mov edi, name
    mov rsi, [r12*8 + target_names]
    call append
    mov rsi, [r13*8 + ad_names]
    call append
    mov rsi, [r14*8 + bit_names]
append:
    lodsb
    stosb
    test al, al
    jnz append
    dec rdi
    ret

.section rodata
.align 8
accesses:       .quad access_read, access_write, access_fetch, access_rmw
data_needs:     .quad EPT_R, EPT_W, EPT_X, EPT_R | EPT_W
data_access:    .long QUAL_READ, QUAL_WRITE, QUAL_FETCH, QUAL_WRITE
target_names:   .quad name_data, name_pt, name_pd, name_pdpt, name_pml4
ad_names:       .quad name_ad_off, name_ad_on
bit_names:      .quad name_set, name_clear
name_data:      .asciz "data page"
name_pt:        .asciz "guest PT"
name_pd:        .asciz "guest PD"
name_pdpt:      .asciz "guest PDPT"
name_pml4:      .asciz "guest PML4"
name_ad_off:    .asciz ", EPT A/D off"
name_ad_on:     .asciz ", EPT A/D on"
name_set:       .asciz ", guest A/D set"
name_clear:     .asciz ", guest A/D clear"

.section bss
.align 8
targets:        .skip 5 * 8
entries:        .skip 5 * 8
ad_before:      .skip 8
set_result:     .skip 8
compared:       .skip 8
want_reason:    .skip 8
want_qualification: .skip 8
got_caught:     .skip 8
got_reason:     .skip 8
got_qualification: .skip 8
got_gpa:        .skip 8
got_gva:        .skip 8
name:           .skip 128
