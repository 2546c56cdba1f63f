; rdma: an RDMA engine and the guest share pages that the host swaps, moves and copies, and lose no byte
;
; The VMM exports a range of guest memory to the engine, on demand: nothing is pinned. The guest posts
; work requests in a ring that lies in that range itself, rings the doorbell and polls for completions,
; while the host takes the pages away: the engine has to fault them in again, as the guest has.
;
; param pages=4          pages of each of three buffers, at most 16
; param rounds=3         of each kind of request, calm; and of all kinds in a storm
; param weather=200000   ns between two things the host does in the storm, about; 0 for no storm
; vmcalls: rdma_register rdma_deregister rdma_peer_read rdma_peer_write rdma_peer_add swap_out migrate fork child_read child_exit weather
.include "runtime.inc"

.equ PATIENCE, 1 << 20
.equ SHIFT_LOCAL, 0x10                   ; buffers begin at odd places in their pages
.equ SHIFT_REMOTE, 0x228
.equ UNUSED_KEY, 9999

main:
    PASS "the guest runs without the engine"
    NEED_HOST "the RDMA engine", .end
    PARAM rax, "pages", 4
    AT_LEAST rax, 1
    cmp rax, 16
    jbe .pages
    mov eax, 16
.pages:
    mov r12, rax
    PARAM rax, "rounds", 3
    AT_LEAST rax, 1
    mov [rounds], rax
    call take_memory
    HOST3 VMCALL_RDMA_REGISTER, qword ptr [arena], qword ptr [arena_pages], 0
    mov [lkey], rax
    mov [rkey], rax
    HOST_CHECK "the guest's memory is registered", 1
    test rax, rax
    jz .end
    mov r13d, RDMA_GPA
    call reset_queue
    mov r15, [rounds]
.calm:
    call write_round
    call read_round
    call clean_round
    call add_round
    dec r15
    jnz .calm
    call fork_round
    call peer
    call pinned
    call errors
    call storm
    HOST1 VMCALL_RDMA_DEREGISTER, qword ptr [lkey]
    CHECK_EQ "the registration ends", rax, 0
.end:
    ret

; The arena: a page for each ring, one for single words, then three buffers of r12 pages and a bit.
take_memory:
    mov rax, r12
    inc rax
    imul rax, rax, 3
    add rax, 3
    mov [arena_pages], rax
    mov rdi, rax
    call pages_alloc
    mov [arena], rax
    mov [sq], rax
    add rax, 4096
    mov [cq], rax
    add rax, 4096
    mov [word_page], rax
    add rax, 4096
    mov rcx, r12
    inc rcx
    shl rcx, 12
    mov [source], rax
    add rax, rcx
    mov [target], rax
    add rax, rcx
    mov [back], rax
    mov rax, r12
    shl rax, 12
    mov [bytes], rax
    shr rax, 3
    mov [words], rax
    mov qword ptr [seed], 1
    ret

; -- the queue ------------------------------------------------------------------------------------
reset_queue:
    mov qword ptr [produced], 0
    mov rdi, [cq]                        ; a completion of an earlier life would look like one of this
    xor eax, eax
    mov ecx, RDMA_RING_ENTRIES * RDMA_CQE_SIZE / 8
    rep stosq
    mov rax, [cq]
    mov [r13 + RDMA_CQ], rax
    mov rax, [lkey]
    mov [r13 + RDMA_RING_KEY], eax
    mov rax, [sq]
    mov [r13 + RDMA_SQ], rax
    ret

; Posts opcode rdi: local address rsi, remote address rdx, rcx bytes, operand r8. Changes rax, r9.
post:
    mov rax, [produced]
    and eax, RDMA_RING_ENTRIES - 1
    imul eax, eax, RDMA_WQE_SIZE
    add rax, [sq]
    mov [rax], edi
    mov r9, [produced]
    mov [rax + 4], r9d
    mov r9, [lkey]
    mov [rax + 8], r9d
    mov r9, [rkey]
    mov [rax + 12], r9d
    mov [rax + 16], rsi
    mov [rax + 24], rdx
    mov [rax + 32], ecx
    mov dword ptr [rax + 36], 0
    mov [rax + 40], r8
    inc qword ptr [produced]
    ret

; Rings, waits for the last request's completion; rax = its status, -1 if it does not come. Changes rcx, rdx.
complete:
    mov rax, [produced]
    mov [r13 + RDMA_DOORBELL], eax
await:
    mov rax, [produced]
    dec rax
    and eax, RDMA_RING_ENTRIES - 1
    imul eax, eax, RDMA_CQE_SIZE
    add rax, [cq]
    mov ecx, PATIENCE
.poll:
    mov rdx, [rax + 8]
    cmp rdx, [produced]
    je .there
    mov edx, [r13 + RDMA_COMPLETED]      ; an exit is sooner over than a slice of polling
    dec ecx
    jnz .poll
    mov rax, -1
    ret
.there:
    mov eax, [rax + 4]
    ret

; rax = words at rdi that are not the newest pattern's. Changes rdx, rsi.
bad_words:
    mov rsi, [seed]
    mov rdx, [words]
    call check_words
    ret

; A new pattern in the source buffer.
fill_source:
    inc qword ptr [seed]
    mov rdi, [source]
    add rdi, SHIFT_LOCAL
    mov rsi, [seed]
    mov rdx, [words]
    call fill_words
    ret

; What `post` needs for a request between the buffers.
source_to_target:
    mov edi, RDMA_WRITE
    mov rsi, [source]
    add rsi, SHIFT_LOCAL
    mov rdx, [target]
    add rdx, SHIFT_REMOTE
    mov rcx, [bytes]
    xor r8d, r8d
    ret

target_to_back:
    mov edi, RDMA_READ
    mov rsi, [back]
    add rsi, SHIFT_LOCAL
    mov rdx, [target]
    add rdx, SHIFT_REMOTE
    mov rcx, [bytes]
    xor r8d, r8d
    ret

; -- calm -----------------------------------------------------------------------------------------
write_round:
    call fill_source
    HOST2 VMCALL_SWAP_OUT, qword ptr [target], r12
    HOST2 VMCALL_MIGRATE, qword ptr [source], r12
    call source_to_target
    call post
    call complete
    CHECK_EQ "RDMA write completes", rax, WC_SUCCESS
    mov rdi, [target]
    add rdi, SHIFT_REMOTE
    call bad_words
    CHECK_EQ "the guest reads what the engine wrote", rax, 0
    ret

read_round:
    HOST2 VMCALL_SWAP_OUT, qword ptr [arena], qword ptr [arena_pages]   ; the rings too
    call target_to_back
    call post
    call complete
    CHECK_EQ "RDMA read completes", rax, WC_SUCCESS
    HOST2 VMCALL_SWAP_OUT, qword ptr [back], r12
    mov rdi, [back]
    add rdi, SHIFT_LOCAL
    call bad_words
    CHECK_EQ "what only the engine wrote survives the swap file", rax, 0
    ret

; The engine writes pages that it has read since they came from the swap file: it may, as nobody shares
; them, and no entry of the host's tables tells of it. Only the engine can say that they are dirty.
clean_round:
    HOST2 VMCALL_SWAP_OUT, qword ptr [target], r12
    call target_to_back
    call post
    call complete
    CHECK_EQ "RDMA read of swapped pages completes", rax, WC_SUCCESS
    call fill_source
    call source_to_target
    call post
    call complete
    CHECK_EQ "RDMA write over them completes", rax, WC_SUCCESS
    HOST2 VMCALL_SWAP_OUT, qword ptr [target], r12
    mov rdi, [target]
    add rdi, SHIFT_REMOTE
    call bad_words
    CHECK_EQ "the swap file has what the engine wrote last", rax, 0
    ret

; Twenty fetch-adds in one go, while the guest adds to the word beside.
add_round:
    push rbx
    mov rdi, [word_page]
    mov qword ptr [rdi], 5
    mov qword ptr [rdi + 8], 0
    HOST2 VMCALL_SWAP_OUT, rdi, 1
    mov ebx, 20
.post:
    mov edi, RDMA_FETCH_ADD
    mov rsi, [word_page]
    lea rdx, [rsi]
    lea rsi, [rsi + rbx*8 + 256]
    mov ecx, 8
    mov r8d, 3
    call post
    dec ebx
    jnz .post
    mov rax, [produced]
    mov [r13 + RDMA_DOORBELL], eax
    mov rdi, [word_page]
    mov ecx, 1000
.add:
    lock inc qword ptr [rdi + 8]
    dec ecx
    jnz .add
    call await
    CHECK_EQ "fetch-adds complete", rax, WC_SUCCESS
    mov rdi, [word_page]
    CHECK_EQ "their sum", qword ptr [rdi], 65
    CHECK_EQ "the guest's sum beside it", qword ptr [rdi + 8], 1000
    xor eax, eax                         ; each old value once: 5, 8, .. 62
    mov ecx, 20
.sum:
    add rax, [rdi + rcx*8 + 256]
    dec ecx
    jnz .sum
    CHECK_EQ "the old values", rax, 670
    pop rbx
    ret

; A forked process keeps what was there before the engine's write.
fork_round:
    mov rdi, [target]
    mov eax, [rdi + SHIFT_REMOTE]
    mov [old_word], rax
    HOST0 VMCALL_FORK
    HOST_CHECK "fork", 0
    call fill_source
    call source_to_target
    call post
    call complete
    CHECK_EQ "RDMA write after a fork completes", rax, WC_SUCCESS
    mov rdi, [target]
    add rdi, SHIFT_REMOTE
    HOST2 VMCALL_CHILD_READ, rdi, 4
    CHECK_EQ "the child keeps the bytes of the fork", rax, qword ptr [old_word]
    call bad_words
    CHECK_EQ "the guest has the engine's", rax, 0
    HOST0 VMCALL_CHILD_EXIT
    ret

peer:
    mov rdi, [word_page]
    HOST4 VMCALL_RDMA_PEER_WRITE, qword ptr [lkey], rdi, 0x1234, 8
    CHECK_EQ "the peer writes", rax, 0
    CHECK_EQ "the guest sees it", qword ptr [rdi], 0x1234
    mov qword ptr [rdi], 77
    HOST3 VMCALL_RDMA_PEER_READ, qword ptr [lkey], rdi, 8
    CHECK_EQ "the peer reads what the guest wrote", rax, 77
    HOST3 VMCALL_RDMA_PEER_ADD, qword ptr [lkey], rdi, 3
    CHECK_EQ "the peer adds", rax, 77
    CHECK_EQ "and the guest sees that", qword ptr [rdi], 80
    ret

; A pinned region keeps its frames; what the host cannot take it also cannot lose.
pinned:
    HOST3 VMCALL_RDMA_REGISTER, qword ptr [back], r12, 1
    mov [pinned_key], rax
    HOST_CHECK "a pinned registration", 1
    mov rdi, [back]
    mov qword ptr [rdi], 4711
    HOST2 VMCALL_SWAP_OUT, rdi, r12
    CHECK_EQ "no pinned page is swapped out", rax, 0
    HOST3 VMCALL_RDMA_PEER_READ, qword ptr [pinned_key], rdi, 8
    CHECK_EQ "the peer reads the pinned page", rax, 4711
    HOST1 VMCALL_RDMA_DEREGISTER, qword ptr [pinned_key]
    CHECK_EQ "the pinned registration ends", rax, 0
    HOST3 VMCALL_RDMA_PEER_READ, qword ptr [pinned_key], rdi, 8
    CHECK_EQ "its key opens nothing any more", rax, -ENOENT
    ret

errors:
    mov qword ptr [rkey], UNUSED_KEY
    call source_to_target
    call post
    call complete
    CHECK_EQ "a wrong key is refused", rax, WC_REM_ACCESS_ERR
    mov rax, [lkey]
    mov [rkey], rax
    call source_to_target
    call post
    call complete
    CHECK_EQ "behind a failed request all is flushed", rax, WC_WR_FLUSH_ERR
    mov ecx, [r13 + RDMA_STATE]
    CHECK_EQ "the queue says that it failed", rcx, RDMA_ERROR
    call reset_queue
    call source_to_target
    call post
    call complete
    CHECK_EQ "after a reset it works again", rax, WC_SUCCESS
    ret

; -- the storm ------------------------------------------------------------------------------------
storm:
    PARAM rax, "weather", 200000
    test rax, rax
    jz .end
    HOST1 VMCALL_WEATHER, rax
    HOST_CHECK "weather", 0
    mov rax, [word_page]
    mov qword ptr [rax], 0
    mov r15, [rounds]
    imul r15, r15, 4
    mov r14, r15
    xor ebx, ebx                         ; bad words, and requests that failed
.round:
    call fill_source
    call source_to_target
    call post
    call target_to_back
    call post
    mov edi, RDMA_FETCH_ADD
    mov rdx, [word_page]
    lea rsi, [rdx + 64]
    mov ecx, 8
    mov r8d, 1
    call post
    call complete
    add rbx, rax
    mov rdi, [target]
    add rdi, SHIFT_REMOTE
    call bad_words
    add rbx, rax
    mov rdi, [back]
    add rdi, SHIFT_LOCAL
    call bad_words
    add rbx, rax
    dec r15
    jnz .round
    CHECK_EQ "no byte is lost in the storm", rbx, 0
    mov rax, [word_page]
    CHECK_EQ "and no addition", qword ptr [rax], r14
    mov ecx, [r13 + RDMA_COMPLETED]
    CHECK_EQ "every request has its completion", rcx, qword ptr [produced]
.end:
    ret

.section bss
.align 8
arena:          .skip 8
arena_pages:    .skip 8
sq:             .skip 8
cq:             .skip 8
word_page:      .skip 8
source:         .skip 8
target:         .skip 8
back:           .skip 8
bytes:          .skip 8
words:          .skip 8
seed:           .skip 8
rounds:         .skip 8
produced:       .skip 8
lkey:           .skip 8
rkey:           .skip 8
pinned_key:     .skip 8
old_word:       .skip 8
