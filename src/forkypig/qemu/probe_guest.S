# The guest that a KVM must run before Forky Pig believes in it. What it does is what a stock kernel does first and
# what a broken nested KVM hangs in: protected mode, page tables, long mode, a page fault that is handled, timer
# interrupts that wake a halted CPU. It says so on COM1, a line each, and halts.
#
# A flat multiboot image (QEMU's -kernel loads it): 560 bytes that need no kernel of anybody's.
# tests/unit/test_accelerator_probe.py assembles it and holds the result against probe_guest.py.

        .set    COM1, 0x3f8
        .set    MAGIC, 0x1BADB002
        .set    FLAGS, 0x00010000       # the addresses below are given
        .set    PML4, 0x200000
        .set    PDPT, 0x201000
        .set    PD, 0x202000
        .set    IDT, 0x203000
        .set    TICKS, 0x204000
        .set    STACK, 0x208000
        .set    UNMAPPED, 0x600000      # the fourth entry of PD

        .text
        .code32
header: .long   MAGIC, FLAGS, -(MAGIC + FLAGS)
        .long   header, header, end, STACK, start

start:  cli
        cld
        movl    $STACK, %esp
        movl    $protected, %esi
        call    print
        movl    $PML4, %edi             # tables, IDT and counter: all zero
        xorl    %eax, %eax
        movl    $(5 * 1024), %ecx
        rep stosl
        movl    $(PDPT + 3), PML4
        movl    $(PD + 3), PDPT
        movl    $0x000083, PD           # 0 to 4 MiB as they are, in pages of 2 MiB
        movl    $0x200083, PD + 8
        movl    %cr4, %eax
        orl     $0x20, %eax             # PAE
        movl    %eax, %cr4
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $0xC0000080, %ecx       # EFER.LME
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000000, %eax
        movl    %eax, %cr0
        lgdt    gdt_at
        ljmp    $8, $long

print:  movw    $COM1, %dx
1:      lodsb
        testb   %al, %al
        jz      2f
        outb    %al, %dx
        jmp     1b
2:      ret

        .code64
print64:
        movw    $COM1, %dx
1:      lodsb
        testb   %al, %al
        jz      2f
        outb    %al, %dx
        jmp     1b
2:      ret

long:   movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $in_long_mode, %esi
        call    print64
        xorl    %eax, %eax
        cpuid
        movl    $faulted, %eax          # IDT 14: page fault
        movl    $(IDT + 14 * 16), %edi
        call    gate
        movl    $ticked, %eax           # IDT 32: IRQ 0
        movl    $(IDT + 32 * 16), %edi
        call    gate
        lidt    idt_at
        movl    $0x666f726b, UNMAPPED   # faults; the handler maps it
        cmpl    $0x666f726b, UNMAPPED
        jne     stop
        movl    $mapped, %esi
        call    print64
        movl    $legacy, %esi           # pairs of port and value: the interrupt controllers and the timer
1:      lodsw
        movw    %ax, %dx
        lodsb
        outb    %al, %dx
        testw   %dx, %dx
        jnz     1b
        sti
1:      hlt
        cmpl    $3, TICKS
        jb      1b
        cli
        movl    $ready, %esi
        call    print64
stop:   hlt
        jmp     stop

gate:   movw    %ax, (%rdi)
        movl    $0x8E000008, 2(%rdi)    # selector 8; present, interrupt gate
        shrl    $16, %eax
        movw    %ax, 6(%rdi)
        ret

faulted:
        movl    $(UNMAPPED + 0x83), PD + 24
        addq    $8, %rsp                # the error code
        iretq

ticked: pushq   %rax
        incl    TICKS
        movb    $0x20, %al              # end of interrupt
        outb    %al, $0x20
        popq    %rax
        iretq

        .balign 8
gdt:    .quad   0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF
gdt_at: .word   23
        .long   gdt
idt_at: .word   33 * 16 - 1
        .quad   IDT

        .macro  port number, value
        .word   \number
        .byte   \value
        .endm
legacy: port    0x20, 0x11              # 8259: vectors 32 to 47, IRQ 0 alone
        port    0xA0, 0x11
        port    0x21, 0x20
        port    0xA1, 0x28
        port    0x21, 0x04
        port    0xA1, 0x02
        port    0x21, 0x01
        port    0xA1, 0x01
        port    0x21, 0xFE
        port    0xA1, 0xFF
        port    0x43, 0x34              # 8254: about a kilohertz
        port    0x40, 0xA9
        port    0x40, 0x04
        port    0, 0

protected:      .asciz  "forky-probe: protected mode\n"
in_long_mode:   .asciz  "forky-probe: long mode\n"
mapped:         .asciz  "forky-probe: page fault handled\n"
ready:          .asciz  "forky-probe: ready\n"
end:
