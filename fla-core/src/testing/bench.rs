//! t
/// t
pub struct Bench; pub struct Measured; pub struct Record; pub fn measure_graph() {} pub fn measure_stream() {}
