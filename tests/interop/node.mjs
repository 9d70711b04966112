// The js-libp2p node, with the settings that a Formation network needs.

import './polyfill.mjs'
import fs from 'node:fs'
import { createLibp2p } from 'libp2p'
import { tcp } from '@libp2p/tcp'
import { noise } from '@libp2p/noise'
import { preSharedKey } from '@libp2p/pnet'
import { tls } from '@libp2p/tls'
import { yamux } from '@libp2p/yamux'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { gossipsub } from '@libp2p/gossipsub'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { generateKeyPairFromSeed } from '@libp2p/crypto/keys'
import { peerIdFromString } from '@libp2p/peer-id'
import { kadOf, unhex } from './formation.mjs'

// 32 bytes; the node's key, and that of its lane.
export const seed = unhex(process.argv[2])
// security: "noise" (default) or "tls"; networkKey: a pre-shared key's file; network: the id,
// hexadecimal, without which it takes part in no Kademlia.
const options = JSON.parse(process.argv[3] ?? '{}')
const networkId = options.network ?? '00'.repeat(32)
export const MANY = { maxInboundStreams: 4096, maxOutboundStreams: 4096 }

export const node = await createLibp2p({
  privateKey: await generateKeyPairFromSeed('Ed25519', seed),
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [options.security === 'tls' ? tls() : noise()],
  ...(options.networkKey ? { connectionProtector: preSharedKey({ psk: fs.readFileSync(options.networkKey) }) } : {}),
  streamMuxers: [yamux()],
  // By itself it takes 5 connections a second from one host, and dials no loopback address.
  connectionManager: { inboundConnectionThreshold: 1e6 },
  connectionGater: { denyDialMultiaddr: () => false },
  services: {
    identify: identify(),
    // Kademlia pings, too: one at a time would be too few.
    ping: ping({ maxInboundStreams: 8, maxOutboundStreams: 8 }),
    pubsub: gossipsub({ globalSignaturePolicy: 'StrictSign', allowPublishToZeroTopicPeers: true, emitSelf: false }),
    dht: kadDHT({ protocol: kadOf(networkId), clientMode: false, peerInfoMapper: passthroughMapper, allowQueryWithZeroPeers: true })
  }
})

export const sleep = ms => new Promise(resolve => setTimeout(resolve, ms))

export const open = (peer, protocol) => node.dialProtocol(peerIdFromString(peer), protocol, MANY)

export async function send (stream, data) {
  if (!stream.send(data)) await stream.onDrain()
}
