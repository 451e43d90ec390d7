def test_x(tiny_cache):
    print(tiny_cache)
