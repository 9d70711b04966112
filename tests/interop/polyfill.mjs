// Node 20 lacks Promise.withResolvers, which js-libp2p 3 calls. To be imported before it.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new this((a, b) => { resolve = a; reject = b })
  return { promise, resolve, reject }
}
