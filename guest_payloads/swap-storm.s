; swap-storm: more memory than the host has is written, shuffled and verified, and no bit is lost
;
; `mib` MiB are filled with patterns (each page its own), the pages' contents are swapped pairwise in a
; random order, and every word is verified against the permutation. With less host RAM than that the
; host must swap; where it can, it is asked to make weather too: to migrate, swap out, fork and copy
; random pages all the while. The payload notices nothing of it.
;
; param mib=40      how much memory to use (less where RAM is smaller)
; param passes=3    write, then shuffle and verify in turn; at least 3, the last is always a verify
; param seed=1      of the patterns and of the permutation
; param weather=3000000  ns between two things the host does, about; 0 for none
; vmcalls: weather
.include "runtime.inc"

main:
    PARAM rax, "seed", 1
    mov [seed], rax
    mov [rng_state], rax
    PARAM rax, "passes", 3
    AT_LEAST rax, 3
    mov [passes], rax
    call take_memory
    PRINT "swap-storm: "
    PRINT_DEC r12
    PRINT " pages, "
    PRINT_DEC qword ptr [passes]
    PRINT " passes, seed "
    PRINT_DEC qword ptr [seed]
    PRINT "\n"
    PARAM rax, "weather", 3000000
    test rax, rax
    jz .calm
    HOST1 VMCALL_WEATHER, rax            ; whatever the answer: the passes are the same
.calm:
    call write_pass
    PASS "write pass"
    mov ebx, 1
.pass:
    call shuffle_pass
    PASS "shuffle pass"
    inc rbx
    call verify_pass
    CHECK_EQ "verify pass", rax, 0
    inc rbx
    cmp rbx, [passes]
    jb .pass
    ret

; r12 = pages, r13 = the first one, r14 = the permutation (a dword a page).
take_memory:
    PARAM rax, "mib", 40
    AT_LEAST rax, 1
    shl rax, 8
    mov rcx, [heap_end]
    sub rcx, [heap_next]
    shr rcx, 12
    sub rcx, 16
    mov rdx, rcx                         ; a page of permutation serves 1024 pages
    shr rdx, 10
    sub rcx, rdx
    cmp rax, rcx
    jbe .fits
    mov rax, rcx
.fits:
    mov r12, rax
    lea rdi, [rax + 1023]
    shr rdi, 10
    call pages_alloc
    mov r14, rax
    mov rdi, r12
    call pages_alloc
    mov r13, rax
    ret

; rsi = the pattern's seed of page number rax. Changes rax, rcx, rdx.
page_seed:
    add rax, [seed]
    call mix
    mov rsi, rax
    ret

write_pass:
    push rbx
    xor ebx, ebx
.page:
    mov [r14 + rbx*4], ebx
    mov rax, rbx
    call page_seed
    mov rdi, rbx
    shl rdi, 12
    add rdi, r13
    mov edx, 512
    call fill_words
    inc rbx
    cmp rbx, r12
    jb .page
    pop rbx
    ret

; Fisher-Yates: page i changes its contents with a page chosen from 0..i.
shuffle_pass:
    push rbx
    mov rbx, r12
.page:
    dec rbx
    jz .end
    call rng_next
    xor edx, edx
    lea rcx, [rbx + 1]
    div rcx                              ; rdx = the other page
    mov eax, [r14 + rbx*4]
    xchg eax, [r14 + rdx*4]
    mov [r14 + rbx*4], eax
    mov rdi, rbx
    shl rdi, 12
    add rdi, r13
    mov rsi, rdx
    shl rsi, 12
    add rsi, r13
    mov ecx, 512
.word:
    mov rax, [rdi]
    mov rdx, [rsi]
    mov [rsi], rax
    mov [rdi], rdx
    add rdi, 8
    add rsi, 8
    dec ecx
    jnz .word
    jmp .page
.end:
    pop rbx
    ret

; rax = words that are not what the permutation says.
verify_pass:
    push rbx
    push r15
    xor ebx, ebx
    xor r15d, r15d
.page:
    mov eax, [r14 + rbx*4]
    call page_seed
    mov rdi, rbx
    shl rdi, 12
    add rdi, r13
    mov edx, 512
    call check_words
    test rax, rax
    jz .good
    test r15, r15
    jnz .count
    call print_mismatch
.count:
    add r15, rax
.good:
    inc rbx
    cmp rbx, r12
    jb .page
    mov rax, r15
    pop r15
    pop rbx
    ret

print_mismatch:
    PRINT "first bad word: page "
    PRINT_DEC rbx
    PRINT " at "
    PRINT_HEX qword ptr [mismatch_at]
    PRINT " got "
    PRINT_HEX qword ptr [mismatch_got]
    PRINT " want "
    PRINT_HEX qword ptr [mismatch_want]
    PRINT "\n"
    ret

.section bss
.align 8
seed:   .skip 8
passes: .skip 8
