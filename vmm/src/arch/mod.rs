//! What is x86-64 about the VM: the state that Linux's 64-bit boot protocol asks for, and the
//! descriptions of the machine that the kernel reads.

pub mod boot_params;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod registers;
