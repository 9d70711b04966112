// The packages of this folder, for programs elsewhere (bench/macro/p2p_peer.mjs): Node.js looks for packages beside the importer.

import './polyfill.mjs'
export { createLibp2p } from 'libp2p'
export { tcp } from '@libp2p/tcp'
export { noise } from '@libp2p/noise'
export { yamux } from '@libp2p/yamux'
export { identify } from '@libp2p/identify'
export { ping } from '@libp2p/ping'
export { gossipsub } from '@libp2p/gossipsub'
export { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
export { generateKeyPair, generateKeyPairFromSeed } from '@libp2p/crypto/keys'
export { peerIdFromString } from '@libp2p/peer-id'
export { multiaddr } from '@multiformats/multiaddr'
