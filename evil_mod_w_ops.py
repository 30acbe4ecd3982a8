open('/tmp/w_ops/k2/EVIL','w').write('x')
class F: pass
