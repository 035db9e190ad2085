//! Between a node agent, or a person, and one VM process: Firecracker's paths and JSON for what both have.
//! (being written with the VMM)
