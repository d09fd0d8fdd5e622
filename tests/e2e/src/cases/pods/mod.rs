//! Kubernetes: pods by way of CRI.

mod life;
mod limits;
mod network;
mod sandbox;
mod security;
mod volumes;

use super::{Case, Setting, bulkhead, case};

pub fn cases() -> Vec<Case> {
    [
        life::cases(),
        volumes::cases(),
        limits::cases(),
        network::cases(),
        security::cases(),
        sandbox::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
