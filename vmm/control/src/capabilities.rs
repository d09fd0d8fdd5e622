//! What KVM on a host must be able to do.

/// Number and name of each extension that the VMM asks `KVM_CHECK_EXTENSION` for, as in
/// `linux/kvm.h`. `bulkhead check` asks for the same.
pub const NEEDED_CAPABILITIES: [(u32, &str); 7] = [
    (121, "KVM_CAP_SPLIT_IRQCHIP"),
    (32, "KVM_CAP_IRQFD"),
    (36, "KVM_CAP_IOEVENTFD"),
    (3, "KVM_CAP_USER_MEMORY"),
    (81, "KVM_CAP_READONLY_MEM"),
    (4, "KVM_CAP_SET_TSS_ADDR"),
    (136, "KVM_CAP_IMMEDIATE_EXIT"),
];

#[cfg(test)]
mod tests {
    use kvm_bindings::{
        KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD, KVM_CAP_IRQFD, KVM_CAP_READONLY_MEM,
        KVM_CAP_SET_TSS_ADDR, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_USER_MEMORY,
    };

    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        let numbers = NEEDED_CAPABILITIES.map(|(number, _)| number);
        let expected = [
            KVM_CAP_SPLIT_IRQCHIP,
            KVM_CAP_IRQFD,
            KVM_CAP_IOEVENTFD,
            KVM_CAP_USER_MEMORY,
            KVM_CAP_READONLY_MEM,
            KVM_CAP_SET_TSS_ADDR,
            KVM_CAP_IMMEDIATE_EXIT,
        ];
        assert_eq!(numbers, expected);
    }
}
