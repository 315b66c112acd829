//! Length checks at the entry of every pass.

/// Panics unless `tensor` holds as many elements as its shape says.
///
/// References are test oracles, so a wrong length is an error of the program that calls them.
#[track_caller]
pub(crate) fn len<F>(name: &str, tensor: &[F], shape: &[usize]) {
    let want: usize = shape.iter().product();
    assert_eq!(
        tensor.len(),
        want,
        "`{name}` is {shape:?}, which is {want} elements, but holds {}",
        tensor.len()
    );
}

/// The same for a tensor that may be absent.
#[track_caller]
pub(crate) fn len_opt<F>(name: &str, tensor: Option<&[F]>, shape: &[usize]) {
    if let Some(tensor) = tensor {
        len(name, tensor, shape);
    }
}
