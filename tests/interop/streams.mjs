// Commands and protocols for the tests of the multiplexer: streams of all kinds, from both sides.

import crypto from 'node:crypto'
import { hex, sha256 } from './formation.mjs'
import { MANY, node, open, send, sleep } from './node.mjs'

const pattern = (start, size) => {
  const data = new Uint8Array(size)
  for (let i = 0; i < size; i++) data[i] = (start + i) * 31 % 251
  return data
}

const sha = data => hex(sha256(data))

// Sends `size` bytes of the pattern, then FIN; the digest of what comes back.
async function pour (stream, size, pieceSize) {
  const piece = pattern(0, 251 * Math.ceil(pieceSize / 251) + 251)
  for (let sent = 0; sent < size;) {
    const count = Math.min(pieceSize, size - sent)
    await send(stream, piece.slice(sent % 251, sent % 251 + count))
    sent += count
  }
  await stream.close()
}

async function drain (stream, pauseMs = 0) {
  const digest = crypto.createHash('sha256')
  let size = 0
  for await (const data of stream) {
    const bytes = data.subarray()
    digest.update(bytes)
    size += bytes.length
    if (pauseMs) await sleep(pauseMs)
  }
  return { size, digest: digest.digest('hex') }
}

const ended = { resets: 0, ends: 0 }
async function serve (protocol, handler) {
  await node.handle(protocol, async stream => {
    try { await handler(stream); ended.ends++ } catch (error) { ended.resets++; stream.abort(error) }
  }, MANY)
}

await serve('/interop/echo/1', async stream => {
  for await (const data of stream) await send(stream, data)
  await stream.close()
})
// Answers with the size and digest once the other side has said that it ends: a half-closed stream still carries that.
const sink = pauseMs => async stream => {
  const got = await drain(stream, pauseMs)
  await send(stream, Buffer.from(JSON.stringify(got)))
  await stream.close()
}
await serve('/interop/sink/1', sink(0))
await serve('/interop/slow/1', sink(2))
// For half a second it gives no window; then all is read. (An iterator alone holds nobody back: js collects for it.)
await serve('/interop/paused/1', async stream => {
  stream.pause()
  await sleep(500)
  const all = drain(stream)
  stream.resume()
  await send(stream, Buffer.from(JSON.stringify(await all)))
  await stream.close()
})
await serve('/interop/source/1', async stream => {
  const asked = []
  for await (const data of stream) asked.push(data.subarray())
  await pour(stream, Number(Buffer.concat(asked).toString()), 65536)
})
await serve('/interop/reset/1', async stream => {
  await send(stream, Buffer.from('so far'))
  await sleep(50)
  throw new Error('enough')
})

export const commands = {
  async echo ({ peer, size, piece }) {
    const stream = await open(peer, '/interop/echo/1')
    const [, got] = await Promise.all([pour(stream, size, piece), drain(stream)])
    return got
  },
  async sink ({ peer, size, piece, protocol }) {
    const stream = await open(peer, protocol ?? '/interop/sink/1')
    await pour(stream, size, piece)
    let answer = ''
    for await (const data of stream) answer += Buffer.from(data.subarray()).toString()
    return JSON.parse(answer)
  },
  async source ({ peer, size, pauseMs }) {
    const stream = await open(peer, '/interop/source/1')
    await send(stream, Buffer.from(String(size)))
    await stream.close()
    return await drain(stream, pauseMs ?? 0)
  },
  async many ({ peer, count, size }) {
    const one = async () => (await commands.echo({ peer, size, piece: size })).size
    return { sizes: await Promise.all(Array.from({ length: count }, one)) }
  },
  async reset ({ peer }) {
    // It may be reset before the negotiation has returned: then js calls that a bad state of the stream.
    try { return { end: await drain(await open(peer, '/interop/reset/1')) } } catch (error) { return { error: error.name } }
  },
  // Of the multiplexer itself.
  async muxerPing () { return { ms: await node.getConnections()[0].muxer.ping({ signal: AbortSignal.timeout(3000) }) } },
  async abort ({ peer, count }) {
    for (let i = 0; i < count; i++) {
      const stream = await open(peer, '/interop/sink/1')
      await send(stream, pattern(0, 1000))
      stream.abort(new Error('changed my mind'))
    }
    return {}
  },
  // Opens more than the other side serves: some are reset.
  async tooMany ({ peer, count }) {
    async function one () {
      try {
        return (await commands.echo({ peer, size: 1000, piece: 1000 })).size === 1000
      } catch { return false }
    }
    const held = await Promise.all(Array.from({ length: count }, one))
    return { served: held.filter(Boolean).length }
  },
  // A life of many streams, some at a time: whole ones, broken off while sending or reading, reset by the other side.
  async life ({ peer, randomSeed, count, width }) {
    let state = randomSeed >>> 0
    const random = limit => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0
      return Math.floor(state / 2 ** 32 * limit)
    }
    const wrong = []
    async function one () {
      const kind = random(5), size = 1 + random(400000), piece = 1 + random(100000)
      if (kind === 0) {
        const got = await commands.echo({ peer, size, piece })
        if (got.size !== size || got.digest !== sha(pattern(0, size))) wrong.push(`echo of ${size}: ${got.size}`)
      } else if (kind === 1) {
        const got = await commands.sink({ peer, size, piece })
        if (got.size !== size || got.digest !== sha(pattern(0, size))) wrong.push(`sink of ${size}: ${got.size}`)
      } else if (kind === 2) {
        const stream = await open(peer, '/interop/source/1')
        await send(stream, Buffer.from(String(size)))
        await stream.close()
        // Read a little, and let go.
        for await (const _ of stream) break
        stream.abort(new Error('read enough'))
      } else if (kind === 3) {
        const stream = await open(peer, '/interop/sink/1')
        await send(stream, pattern(0, Math.min(size, 200000)))
        stream.abort(new Error('sent enough'))
      } else if ((await commands.reset({ peer })).error === undefined) wrong.push('a reset was not seen')
    }
    let left = count
    const lane = async () => { while (left-- > 0) await one() }
    await Promise.all(Array.from({ length: width }, lane))
    return { wrong }
  },
  async open () { return node.getConnections().flatMap(c => c.streams.map(s => s.protocol)).sort() },
  async ended () { return ended }
}
